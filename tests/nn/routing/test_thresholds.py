"""Thresholds against plain loops: measured by a running mean, or paced by what a row spent."""

import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn import observe
from modjax.nn.routing.losses import RuleRecord
from modjax.nn.routing.thresholds import paced


def test_thresholds_are_the_plain_mean_at_first_and_then_forget_at_one_in_a_hundred():
    old = np.array([[0.5], [-2.0]], np.float32)
    rule = {"threshold": jnp.asarray(old)}
    blocks = {"1_mod": {"rule": rule, "inner": jnp.ones((2, 3))}, "0_seq": {}}
    kth = np.array([[1.0, 2.0, np.inf], [np.inf, np.inf, -np.inf]], np.float32)
    records = {"1_mod/rule": RuleRecord({}, kth_B=jnp.asarray(kth))}
    for updates, rate in ((0, 1.0), (1, 0.5), (3, 0.25), (99, 0.01), (10_000, 0.01)):
        new, count = observe(blocks, records, jnp.int32(updates), stacked=True)
        assert count == 2
        # No row of the second repetition knows its k-th score.
        expected = [[0.5 + rate * (1.5 - 0.5)], [-2.0]]
        np.testing.assert_allclose(new["1_mod"]["rule"]["threshold"], expected, rtol=1e-6)
        assert new["1_mod"]["inner"] is blocks["1_mod"]["inner"] and new["0_seq"] == {}


@pytest.mark.parametrize("capacity, length, spent", [(0.125, 40, 0), (0.5, 17, 3), (0.3, 1, 9)])
def test_pacing_equals_a_plain_loop_and_may_be_done_in_parts(capacity, length, spent):
    rng = np.random.default_rng(length)
    odds = rng.normal(0, 3, (4, length)).astype(np.float32)
    first = 2 * spent  # the position of the first of these
    expected = np.zeros((4, length), bool)
    counts = np.full(4, spent)
    for b in range(4):
        for i in range(length):
            fair = capacity * (first + i)
            ahead = (counts[b] - fair) / (fair + 4) ** 0.5
            expected[b, i] = odds[b, i] > ahead * np.exp(ahead**2 / 2)
            counts[b] += expected[b, i]
    seen, start = jnp.full(4, first), jnp.full(4, spent)
    all_BL = jnp.ones(odds.shape, bool)
    whole = paced(jnp.asarray(odds), capacity, all_BL, seen, start)
    np.testing.assert_array_equal(whole, expected)
    assert length == 1 or not np.array_equal(expected, odds > 0)
    half = length // 2
    early = paced(odds[:, :half], capacity, all_BL[:, :half], seen, start)
    spent_B = start + early.sum(axis=1)
    late = paced(odds[:, half:], capacity, all_BL[:, half:], seen + half, spent_B)
    # Positions that do not count change nothing of those that do.
    wide, counted = np.repeat(odds, 2, axis=1), np.tile([True, False], length)
    sparse = paced(jnp.asarray(wide), capacity, jnp.tile(counted, (4, 1)), seen, start)
    np.testing.assert_array_equal(sparse, np.repeat(expected, 2, axis=1) & counted)
    np.testing.assert_array_equal(np.concatenate([early, late], axis=1), expected)


@pytest.mark.parametrize("length, most", [(256, 1.5), (1024, 1.25)])
def test_a_paced_row_keeps_near_its_capacity_though_it_asks_for_all(length, most):
    # A modest row, rows that ask for everything or nothing, and one that wakes up half way.
    odds = np.random.default_rng(0).normal(-2, 2, (4, length)).astype(np.float32)
    odds[1] += 16
    odds[2] -= 8
    odds[3, length // 2 :] += 16
    all_BL, none_B = jnp.ones(odds.shape, bool), jnp.zeros(4, jnp.int32)
    selected = np.asarray(paced(jnp.asarray(odds), 0.125, all_BL, none_B, none_B))
    asked, spent = (odds > 0).mean(axis=1) / 0.125, selected.mean(axis=1) / 0.125
    assert asked[1] > 5 and asked[2] < 0.1
    assert np.all(spent < most) and spent[2] > asked[2]
