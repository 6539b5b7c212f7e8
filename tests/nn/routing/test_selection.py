"""Selections against a plain loop over sequences and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn.routing.selection import (
    gather,
    position_noise,
    scatter_add,
    select_first_k,
    select_top_k,
    selected_mask,
)
from modjax.specs import selected_tokens


def plain_top_k(scores, k, valid):
    """Returns positions of the k best valid scores of one sequence; ties go to earlier ones."""
    candidates = [(-scores[i], i) for i in range(len(scores)) if valid[i]]
    return sorted(i for _, i in sorted(candidates)[:k])


@pytest.mark.parametrize("batch, length, k", [(1, 1, 1), (3, 7, 1), (2, 16, 5), (4, 33, 33)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("padding", [False, True])
def test_top_k_equals_a_plain_loop(batch, length, k, dtype, padding):
    rng = np.random.default_rng(length * k)
    # Few distinct values, so that ties at the k-th score are common.
    scores = jnp.asarray(rng.integers(0, 6, (batch, length)), dtype)
    valid = rng.random((batch, length)) < 0.6 if padding else np.ones((batch, length), bool)
    got = select_top_k(scores, scores, k, jnp.asarray(valid) if padding else None)
    for b in range(batch):
        expected = plain_top_k(np.asarray(scores[b], np.float32), k, valid[b])
        kept = np.asarray(got.valid_BK[b])
        assert np.asarray(got.indices_BK[b])[kept].tolist() == expected
        assert kept.sum() == min(k, valid[b].sum())
        np.testing.assert_array_equal(
            np.asarray(got.scores_BK[b], np.float32)[kept],
            np.asarray(scores[b], np.float32)[expected],
        )
        assert np.all(np.asarray(got.indices_BK[b])[~kept] >= length)
        assert np.all(np.diff(np.asarray(got.indices_BK[b])) > 0)
        ranks = np.sort(np.asarray(scores[b], np.float32)[valid[b]])[::-1]
        assert float(got.kth_B[b]) == (ranks[:k][-1] if len(ranks) else np.inf)


def test_scores_a_few_ulps_apart_select_the_same_positions_the_earlier():
    # Faults: a bare top-k, whose ties between equal inputs the last bit decides; ranks rounded to
    # fewer bits, which part where equal inputs lie on both sides of a step.
    rng, rows, length, k = np.random.default_rng(0), 400, 40, 9
    scores = rng.normal(size=(rows, length)).astype(np.float32)
    counts = rng.integers(k, length + 1, rows)
    valid = np.arange(length) < counts[:, None]
    expected, tied = np.zeros((rows, length), bool), np.zeros(rows, bool)
    own = np.array([max(1, round(k * n / length)) for n in counts])
    for b, n in enumerate(counts):
        better = rng.integers(0, own[b])
        alike = rng.integers(own[b] - better, n - better + 1)  # to fill it, or more
        order = rng.permutation(n)
        border = np.float32(rng.normal())
        scores[b, order[:better]] = border + 0.1 + rng.random(better)
        scores[b, order[better : better + alike]] = border
        scores[b, order[better + alike :]] = border - 0.1 - rng.random(n - better - alike)
        expected[b, order[:better]] = True
        expected[b, np.sort(order[better : better + alike])[: own[b] - better]] = True
        tied[b] = better + alike > own[b]
    run = jax.jit(lambda scores: select_top_k(scores, scores, k, jnp.asarray(valid), own))
    for scale in (1e-3, 1.0, 1e4):
        for _ in range(3):
            shaken = np.float32(scale) * scores
            for _ in range(2):
                towards = np.where(rng.random(shaken.shape) < 0.5, -np.inf, np.inf)
                shaken = np.nextafter(shaken, towards.astype(np.float32))
            got = run(shaken)
            np.testing.assert_array_equal(selected_mask(got, length), expected)
            np.testing.assert_array_equal(got.tied_B, tied)
            descending = -np.sort(np.where(valid, -shaken, np.inf), axis=1)
            np.testing.assert_array_equal(got.kth_B, descending[np.arange(rows), own - 1])
    assert 0.2 < tied.mean() < 1


def test_scores_that_are_told_apart_are_taken_by_score_and_a_broken_one_is_not_passed_by():
    scores = jnp.array([[1.0, 1.0 + 1e-4, 0.5, -2.0], [0.0, 3.0, jnp.nan, 1.0]])
    got = select_top_k(scores, scores, 1, None)
    # A run whose scores are no numbers must lose its loss, too, or nobody would see it.
    assert got.indices_BK.tolist() == [[1], [2]] and not np.any(got.tied_B)


def test_gather_and_scatter_equal_a_plain_loop_in_values_and_gradients():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 4)).astype(np.float32)
    update = rng.normal(size=(3, 5, 4)).astype(np.float32)
    cotangent = rng.normal(size=(3, 9, 4)).astype(np.float32)
    indices = np.array([[0, 2, 3, 7, 8], [1, 2, 9, 10, 11], [4, 5, 6, 9, 10]])

    def transform(x, update):
        return scatter_add(x, jnp.asarray(indices), update * gather(x, jnp.asarray(indices)))

    out, pull = jax.vjp(transform, jnp.asarray(x), jnp.asarray(update))
    expected, grad_x, grad_update = x.copy(), cotangent.copy(), np.zeros_like(update)
    for b in range(3):
        for j, i in enumerate(indices[b]):
            if i < 9:  # beyond the end: read as zero, never written
                expected[b, i] += update[b, j] * x[b, i]
                grad_x[b, i] += update[b, j] * cotangent[b, i]
                grad_update[b, j] = x[b, i] * cotangent[b, i]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    got_x, got_update = pull(jnp.asarray(cotangent))
    np.testing.assert_allclose(got_x, grad_x, rtol=1e-6)
    np.testing.assert_allclose(got_update, grad_update, rtol=1e-6)


def test_gather_broadcasts_what_all_sequences_share():
    table = jnp.arange(12.0).reshape(1, 6, 2)
    indices = jnp.array([[0, 5], [2, 3]])
    np.testing.assert_array_equal(gather(table, indices), np.asarray(table)[0][indices])


def test_scatter_leaves_other_positions_their_bits():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 3)) * 1e-30, jnp.float32)
    indices = jnp.array([[1, 4], [0, 7]])
    out = np.asarray(scatter_add(x, indices, jnp.ones((2, 2, 3))))
    for b in range(2):
        others = [i for i in range(8) if i not in np.asarray(indices[b])]
        assert out[b, others].tobytes() == np.asarray(x)[b, others].tobytes()


def select_by_noise(scores, key):
    rows, positions = jnp.indices(scores.shape)
    return select_top_k(position_noise(key, rows, positions), scores, 8, None)


def test_noise_selects_k_positions_whatever_the_scores_and_weighs_them_by_score():
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(64, 32)), jnp.float32)
    got = select_by_noise(scores, jax.random.key(0))
    assert got.indices_BK.shape == (64, 8) and bool(jnp.all(got.valid_BK))
    np.testing.assert_array_equal(
        got.scores_BK, np.take_along_axis(np.asarray(scores), np.asarray(got.indices_BK), axis=1)
    )
    same_noise = select_by_noise(-3 * scores, jax.random.key(0))
    np.testing.assert_array_equal(got.indices_BK, same_noise.indices_BK)
    other = select_by_noise(scores, jax.random.key(1))
    assert np.any(np.asarray(got.indices_BK) != np.asarray(other.indices_BK))
    counts = np.bincount(np.asarray(got.indices_BK).ravel(), minlength=32)
    assert counts.min() > 0  # 16 expected at each of 32 positions


def test_threshold_takes_exactly_what_lies_above_and_nothing_of_the_padding():
    scores = jnp.array([[0.1, 0.9, 0.5, 0.6], [0.7, 0.2, 0.3, 0.51]])
    valid = jnp.array([[True, True, True, False], [True] * 4])
    got = selected_mask(select_first_k((scores > 0.5) & valid, scores, 4), 4)
    np.testing.assert_array_equal(got, [[False, True, False, False], [True, False, False, True]])


def first_k(wanted, k):
    """Returns each row's first k requested positions, by a plain loop."""
    kept = np.zeros_like(wanted)
    for b, row in enumerate(wanted):
        kept[b, [i for i, want in enumerate(row) if want][:k]] = True
    return kept


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_first_k_wanted_are_kept_and_later_ones_overflow(k):
    rng = np.random.default_rng(k)
    scores = rng.normal(size=(4, 12)).astype(np.float32)
    wanted = rng.random((4, 12)) < np.array([[0.0], [0.3], [0.7], [1.0]])
    got = select_first_k(jnp.asarray(wanted), jnp.asarray(scores), k)
    expected = first_k(wanted, k)
    np.testing.assert_array_equal(selected_mask(got, 12), expected)
    for b in range(4):
        kept = np.asarray(got.valid_BK[b])
        assert np.asarray(got.indices_BK[b])[kept].tolist() == np.flatnonzero(expected[b]).tolist()
        np.testing.assert_array_equal(np.asarray(got.scores_BK[b])[kept], scores[b, expected[b]])
        assert not np.any(np.asarray(got.scores_BK[b])[~kept])


def test_token_choice_takes_the_likelier_path_and_never_more_than_k():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, 16, 2)).astype(np.float32)
    logits[1, :, 1] += 9  # all choose to be processed
    logits[2, :, 0] += 9  # none does
    valid = rng.random((5, 16)) < 0.8
    odds = jnp.asarray(logits[..., 1] - logits[..., 0])
    got = select_first_k((odds > 0) & jnp.asarray(valid), odds, 4)
    probability = np.exp(logits[..., 1]) / np.exp(logits).sum(axis=-1)
    expected = first_k((probability > 0.5) & valid, 4)
    np.testing.assert_array_equal(selected_mask(got, 16), expected)
    assert expected.sum(axis=1)[1:3].tolist() == [4, 0]
    weights = 1 / (1 + np.exp(-np.asarray(got.scores_BK)))
    for b in range(5):
        np.testing.assert_allclose(
            weights[b, np.asarray(got.valid_BK[b])], probability[b, expected[b]], rtol=1e-5
        )


def test_noise_depends_on_key_sequence_and_position_alone():
    sequences, positions = jnp.indices((3, 64))
    noise = np.asarray(position_noise(jax.random.key(0), sequences, positions))
    # Each row of them apart, as its sequence is drawn where it is one of a batch.
    for row, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        drawn = [jax.random.normal(jax.random.fold_in(key, p), ()) for p in (0, 5, 63)]
        np.testing.assert_array_equal(noise[row, [0, 5, 63]], drawn)
    moved, order = np.array([[2, 2, 2], [0, 0, 1]]), np.array([[5, 63, 0], [7, 5, 8]])
    some = position_noise(jax.random.key(0), jnp.asarray(moved), jnp.asarray(order))
    np.testing.assert_array_equal(some, noise[moved, order])
    other = np.asarray(position_noise(jax.random.key(1), sequences, positions))
    assert len(np.unique(np.concatenate([noise, other]))) == 6 * 64
    assert abs(noise.mean()) < 0.25 and 0.8 < noise.std() < 1.2


@pytest.mark.parametrize(
    "capacity, length, k", [(0.125, 2048, 256), (0.125, 3, 1), (0.01, 10, 1), (1.0, 7, 7)]
)
def test_capacity_is_rounded_and_never_selects_nothing(capacity, length, k):
    assert selected_tokens(capacity, length) == k
