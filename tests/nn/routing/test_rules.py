"""Rules of positions against plain numpy: what each selects, how it weighs, what it loses.

Legend: B batch, L positions, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn.routing.rules import evenly_spread
from modjax.nn.routing.selection import position_noise
from modjax.specs import Binary, MoDConfig, Positional
from tests.nn.routing.plain import (
    BATCH,
    CONFIG,
    KS,
    LENGTH,
    VALID,
    X,
    assert_close,
    best_k,
    first_k,
    masked_mean,
    plain_block,
    run_block,
)


def test_token_choice_equals_numpy_in_output_and_losses():
    rule = Binary(balance=3.0, z=0.5)
    block, y, record = run_block(
        "expert_choice", config=MoDConfig(capacity=0.25, rule=rule), valid_BL=VALID
    )
    logits = X @ np.asarray(block.router.w[...])
    probability = np.exp(logits[..., 1]) / np.exp(logits).sum(axis=-1)
    wanted = (probability > 0.5) & VALID
    selected = first_k(wanted, KS)
    assert np.any(wanted & ~selected)
    np.testing.assert_array_equal(record.requested_BL, wanted)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, probability, selected))

    losses = record.own["rule"].losses
    f, p, c = masked_mean(wanted, VALID), masked_mean(probability, VALID), 0.25
    assert_close(losses["balance"], 3 * ((1 - f) * (1 - p) / (1 - c) + f * p / c))
    z = np.square(np.log(np.exp(logits).sum(axis=-1)))
    assert_close(losses["z"], 0.5 * masked_mean(z, VALID))


@pytest.mark.parametrize("name, routing", [("positional", "trained"), ("expert_choice", "causal")])
def test_positional_routing_takes_every_fourth_and_weighs_it_by_the_score(name, routing):
    config = dataclasses.replace(CONFIG, causal=Positional())
    block, y, record = run_block(name, config=config, routing=routing, valid_BL=VALID)
    selected = np.zeros_like(VALID)
    selected[:, 3::4] = True
    selected &= VALID
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, X @ np.asarray(block.router.w[..., 0]), selected))


def test_stochastic_routing_takes_the_k_loudest_positions_and_weighs_them_by_the_score():
    key = jax.random.key(4)
    block, y, record = run_block("stochastic", key=key, valid_BL=VALID)
    rows, positions = np.indices((BATCH, LENGTH))
    selected = best_k(np.asarray(position_noise(key, rows, positions)), VALID)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, X @ np.asarray(block.router.w[..., 0]), selected))


def test_a_threshold_selects_exactly_what_scores_above_it_up_to_its_slack():
    def set_threshold(block):
        block.rule.threshold[...] = jnp.array([0.5])

    block, y, record = run_block("threshold", edit=set_threshold, valid_BL=VALID)
    scores = X @ np.asarray(block.router.w[..., 0])
    wanted = (scores > 0.5) & VALID
    slots = (6, 4, 1)  # 1.5 times a quarter of 16, 11 and 2 positions
    selected = first_k(wanted, slots)
    assert np.any(wanted & ~selected) and np.any(wanted.sum(axis=1) < slots)
    np.testing.assert_array_equal(record.requested_BL, wanted)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, scores, selected))
    # What the threshold is to become: the k-th best score.
    for b, k in enumerate(KS):
        assert record.own["rule"].kth_B[b] == pytest.approx(
            np.sort(scores[b, VALID[b]])[-k], rel=1e-5
        )


def test_expert_choice_knows_the_kth_score_of_each_row_that_is_not_all_padding():
    valid = VALID.copy()
    valid[2] = False
    block, _, record = run_block("expert_choice", valid_BL=valid)
    scores = X @ np.asarray(block.router.w[..., 0])
    np.testing.assert_array_equal(record.selected_BL, best_k(scores, valid))
    for b in (0, 1):
        assert record.own["rule"].kth_B[b] == pytest.approx(
            np.sort(scores[b, valid[b]])[-KS[b]], rel=1e-5
        )
    assert not np.isfinite(record.own["rule"].kth_B[2])


@pytest.mark.parametrize(
    "capacity, chosen",
    [
        (1.0, [0, 1, 2, 3, 4, 5, 6]),
        (0.9, [1, 2, 3, 4, 5, 6]),
        (0.6, [1, 3, 4, 6]),
        (0.5, [1, 3, 5]),
        (0.4, [2, 4]),
        (0.25, [3]),
        (0.1, []),
    ],
)
def test_the_pattern_spreads_its_share_of_the_positions_evenly(capacity, chosen):
    positions = jnp.arange(7)[None]
    assert np.flatnonzero(evenly_spread(positions, capacity)[0]).tolist() == chosen
    # It knows the position, not the place in the array.
    assert np.flatnonzero(evenly_spread(positions + 2, capacity)[0, :-2]).tolist() == [
        i - 2 for i in chosen if i >= 2
    ]


@pytest.mark.parametrize("n", range(1, 60))
def test_at_one_nth_the_pattern_takes_the_last_of_every_n_positions(n):
    positions = np.arange(5000)
    chosen = np.asarray(evenly_spread(jnp.asarray(positions)[None], 1 / n))[0]
    np.testing.assert_array_equal(chosen, positions % n == n - 1)
