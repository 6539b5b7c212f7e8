"""Which keys each query sees, against plain numpy, in values and gradients.

Legend: B batch, L queries, M keys, N heads, G kv heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import Scoring, Side, attend
from modjax.specs import Bidirectional, Blocks, Causal, Prefix, Window

B, N, G, L, H = 2, 4, 2, 11, 6


def tensors(length=L, keys=L):
    rng = np.random.default_rng(0)
    shapes = (B, N, length, H), (B, G, keys, H), (B, G, keys, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain(q, k, v, seen, softcap=None):
    """Returns attention by a plain loop; seen(b, query, key) -> bool is the mask."""
    out = np.zeros_like(q)
    for b, n, i in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[2]) if seen(b, i, j)]
        if not keys:
            continue
        g = n // (N // G)
        scores = q[b, n, i] @ k[b, g, keys].T / np.sqrt(H)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        out[b, n, i] = p / p.sum() @ v[b, g, keys]
    return out


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


SEGMENTS = np.array([[1] * 4 + [2] * 7, [1] * 9 + [2] * 2])
POSITIONS = np.cumsum(1 + np.random.default_rng(1).integers(0, 3, (B, L)), axis=1)
# A mask, and in words of plain Python whether a query at i sees a key at j.
MASKS = {
    Causal(): lambda i, j: j <= i,
    Bidirectional(): lambda i, j: True,
    Window(3): lambda i, j: -3 < i - j < 3,
    Causal() & Window(4): lambda i, j: 0 <= i - j < 4,
    Causal() & Window(1): lambda i, j: i == j,
    Blocks(5): lambda i, j: i // 5 == j // 5,
    Causal() & Blocks(4): lambda i, j: j <= i and i // 4 == j // 4,
    Causal() & Window(6) & Blocks(8): lambda i, j: 0 <= i - j < 6 and i // 8 == j // 8,
    Prefix(7): lambda i, j: j <= i or j < 7,
}


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_query_sees_what_the_mask_says_across_chunk_borders(monkeypatch, mask):
    monkeypatch.setattr("modjax.kernels.plain.MIN_QUERY_CHUNK", 2)
    q, k, v = tensors()
    for segmented, softcap in ((False, None), (True, 0.7)):
        side = Side(POSITIONS, SEGMENTS if segmented else None)

        def seen(b, i, j, segmented=segmented):
            shown = MASKS[mask](POSITIONS[b, i], POSITIONS[b, j])
            return shown and (not segmented or SEGMENTS[b, i] == SEGMENTS[b, j])

        got = attend(q, k, v, Scoring(mask, softcap=softcap), side)
        close(got, plain(q, k, v, seen, softcap))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_queries_and_keys_may_be_at_different_positions_and_some_keys_hidden(mask):
    q, k, v = tensors(3, 7)
    queries = np.array([[5, 1, 30], [4, 11, 12]])
    keys = np.array([[0, 9, 2, 5, 4, 3, 6], [12, 11, 10, 4, 3, 2, 1]])
    valid = np.array([[1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]], bool)

    def seen(b, i, j):
        return valid[b, j] and MASKS[mask](queries[b, i], keys[b, j])

    got = attend(q, k, v, Scoring(mask), Side(queries), Side(keys, None, valid))
    close(got, plain(q, k, v, seen))


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(4), Prefix(7)], ids=str)
def test_gathered_queries_see_the_same_though_later_blocks_of_keys_are_not_read(monkeypatch, mask):
    monkeypatch.setattr("modjax.kernels.plain.MIN_QUERY_CHUNK", 2)
    monkeypatch.setattr("modjax.kernels.plain.KEY_BLOCK", 4)
    q, k, v = tensors(5)
    places = np.array([[0, 2, 3, 7, 8], [1, 4, 5, 6, 0]])  # the last one does not count
    queries = Side(*(np.take_along_axis(x, places, axis=1) for x in (POSITIONS, SEGMENTS)))
    hidden = np.random.default_rng(2).random((B, L)) < 0.2
    keys = Side(POSITIONS, SEGMENTS, ~hidden)
    scoring = Scoring(mask, softcap=2.0)
    got = jax.jit(lambda *x: attend(*x, scoring, queries, keys, jnp.asarray(places)))(q, k, v)

    def seen(b, i, j):
        shown = MASKS[mask](queries.positions_BL[b, i], POSITIONS[b, j])
        return shown and queries.segments_BL[b, i] == SEGMENTS[b, j] and not hidden[b, j]

    expected = plain(q, k, v, seen, softcap=2.0)
    close(got[0], expected[0])
    close(got[1, :, :4], expected[1, :, :4])


def test_a_query_that_sees_no_key_is_given_nothing_and_no_gradient_is_lost():
    q, k, v = (jnp.asarray(x) for x in tensors())
    side = Side(jnp.asarray(POSITIONS), None, jnp.zeros((B, L), bool).at[0].set(True))

    def total(q, k, v):
        out = attend(q, k, v, Scoring(Causal()), side)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    assert np.all(out[1] == 0) and np.all(out[0] != 0)
    for gradient in gradients:
        assert np.all(gradient[1] == 0) and np.all(np.isfinite(gradient))
        assert np.any(gradient[0] != 0)


def test_the_gradient_of_a_capped_score_is_that_of_finite_differences():
    q, k, v = tensors()

    def total(scale):
        out = attend(q * scale, k, v, Scoring(Causal() & Window(3), softcap=0.5), Side(POSITIONS))
        return jnp.sum(jnp.sin(out))

    step = 1e-2
    numeric = (total(1 + step) - total(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), numeric, rtol=2e-2)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_out_of_reach_is_out_of_reach_of_every_selection_of_positions(mask):
    """Chunks leave out keys by their places; whatever is selected, the mask shows none of them."""
    back, ahead = mask.reach
    rng = np.random.default_rng(2)
    for _ in range(20):
        positions = np.sort(rng.choice(40, 16, replace=False))
        seen = mask.seen(positions[:, None], positions[None])
        away = np.arange(16)[:, None] - np.arange(16)[None]
        assert back is None or not np.any(seen & (away > back))
        assert ahead is None or not np.any(seen & (-away > ahead))
    everything = mask.seen(np.arange(40)[:, None], np.arange(40)[None])
    # No query sees more keys than FLOPs count, and no later one a key that a cache gave up.
    assert everything.sum(axis=1).max() <= mask.pairs(1, 40)
    gone = np.tril(np.ones((40, 40), bool), -mask.kept(40))
    assert not np.any(everything & gone)
