"""What each query may see, against plain numpy, in values and gradients.

Legend: B batch, L queries, M keys, N heads, G kv heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import Mask, attend

B, N, G, L, H = 2, 4, 2, 11, 6


def tensors(length=L, keys=L):
    rng = np.random.default_rng(0)
    shapes = (B, N, length, H), (B, G, keys, H), (B, G, keys, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain(q, k, v, seen, softcap):
    """seen(b, query, key) -> bool."""
    out = np.zeros_like(q)
    for b, n, i in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[2]) if seen(b, i, j)]
        g = n // (N // G)
        scores = q[b, n, i] @ k[b, g, keys].T / np.sqrt(H)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        p = np.exp(scores - scores.max())
        out[b, n, i] = p / p.sum() @ v[b, g, keys]
    return out


SEGMENTS = np.array([[1] * 4 + [2] * 7, [1] * 9 + [2] * 2])
POSITIONS = np.cumsum(1 + np.random.default_rng(1).integers(0, 3, (B, L)), axis=1)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_sees_what_the_mask_says(segmented, window, softcap):
    q, k, v = tensors()
    mask = Mask(SEGMENTS if segmented else None, window, POSITIONS)

    def seen(b, i, j):
        near = window is None or POSITIONS[b, i] - POSITIONS[b, j] < window
        return j <= i and near and (not segmented or SEGMENTS[b, i] == SEGMENTS[b, j])

    got = attend(q, k, v, mask, softcap)
    np.testing.assert_allclose(got, plain(q, k, v, seen, softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("length", [1, 3])
def test_queries_after_a_cache_see_it_and_each_other_up_to_themselves(length, window):
    slots = 14
    q, k, v = tensors(length, slots)
    start = np.array([2, 8])
    keys = np.cumsum(1 + np.random.default_rng(2).integers(0, 2, (B, slots)), axis=1)
    own = start[:, None] + np.arange(length)
    positions = np.take_along_axis(keys, own, axis=1)
    mask = Mask(None, window, positions, keys, start)

    def seen(b, i, j):
        near = window is None or positions[b, i] - keys[b, j] < window
        return j <= own[b, i] and near

    got = attend(q, k, v, mask, None)
    np.testing.assert_allclose(got, plain(q, k, v, seen, None), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_capped_score_is_that_of_finite_differences():
    q, k, v = tensors()

    def total(scale):
        return jnp.sum(
            jnp.sin(attend(q * scale, k, v, Mask(window=3, positions_BL=POSITIONS), 0.5))
        )

    step = 1e-2
    numeric = (total(1 + step) - total(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), numeric, rtol=2e-2)
