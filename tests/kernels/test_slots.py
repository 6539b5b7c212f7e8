"""Operations of experts in slots against plain NumPy and JAX's own gradient.

Legend: B batch, E experts, L positions, C slots of an expert, Z rows of a block, D model width,
F feed-forward width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import first_with_counts, weighted_product


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_first_positions_that_reach_a_count(monkeypatch, platform):
    monkeypatch.setattr("modjax.kernels.slots.target", lambda: platform)
    mine_BEL = np.random.default_rng(0).random((2, 3, 20)) < 0.3
    mine_BEL[1, 2] = False
    got = first_with_counts(jnp.cumsum(mine_BEL, axis=2, dtype=jnp.int32), 8)
    for b, e in np.ndindex(2, 3):
        found = np.flatnonzero(mine_BEL[b, e])[:8]
        np.testing.assert_array_equal(got[b, e], [*found, *[20] * (8 - len(found))])


def test_the_weighted_product_has_the_gradients_of_its_formula():
    rng = np.random.default_rng(0)
    shapes = (2, 5, 7), (2, 3, 7), (2, 5), (2, 5, 3)
    h, w, weight, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def formula(h, w, weight):
        return weight[..., None] * jnp.stack([h[e] @ w[e].T for e in range(2)])

    (ours, back), (theirs, back_too) = (
        jax.vjp(f, h, w, weight) for f in (weighted_product, formula)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for got, expected in zip(back(dy), back_too(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
