"""Grouped products against numpy, row by row, and against JAX's own, which is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import grouped_matmul

D, F = 12, 20
SIZES = {
    "even": (64, 64, 64),
    "ragged": (1, 130, 0, 40, 3),
    "an empty end": (70, 0, 9, 0),
    "one takes all": (0, 200, 0),
    "nobody": (0, 0),
}


def by_numpy(x_TD, w_EDF, sizes, back):
    out, start = np.zeros((len(x_TD), w_EDF.shape[1 if back else 2])), 0
    for w_DF, size in zip(w_EDF, sizes, strict=True):
        for row in range(start, start + size):
            out[row] = x_TD[row] @ (w_DF.T if back else w_DF)
        start += size
    return out


def inputs(sizes, back, rest=17):
    rng = np.random.default_rng(0)
    rows = sum(sizes) + rest
    x_TD, dy_TF = (rng.standard_normal((rows, n)) for n in ((F, D) if back else (D, F)))
    return x_TD, rng.standard_normal((len(sizes), D, F)), dy_TF


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_blocks_are_numpys_products(sizes, back):
    x_TD, w_EDF, _ = inputs(sizes, back)
    found = jax.jit(grouped_matmul, static_argnames="back")(
        jnp.float32(x_TD), jnp.float32(w_EDF), jnp.array(sizes), back=back
    )
    np.testing.assert_allclose(found, by_numpy(x_TD, w_EDF, sizes, back), atol=1e-5)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_are_those_of_each_group_by_itself(sizes, back):
    x_TD, w_EDF, dy_TF = inputs(sizes, back)

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, jnp.array(sizes), back=back) * jnp.float32(dy_TF))

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(x_TD), jnp.float32(w_EDF))
    np.testing.assert_allclose(dx, by_numpy(dy_TF, w_EDF, sizes, not back), atol=1e-5)
    start = 0
    for e, size in enumerate(sizes):
        mine = slice(start, start + size)
        expected = dy_TF[mine].T @ x_TD[mine] if back else x_TD[mine].T @ dy_TF[mine]
        np.testing.assert_allclose(dw[e], expected, atol=1e-4)
        start += size


@pytest.mark.parametrize("sizes", [SIZES["ragged"], SIZES["an empty end"]])
def test_rows_without_a_group_may_hold_anything(sizes):
    x_TD, w_EDF, dy_TF = inputs(sizes, False)
    x_TD[sum(sizes) :] = np.nan

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, jnp.array(sizes)) * jnp.float32(dy_TF))

    found = jax.value_and_grad(loss, argnums=(0, 1))(jnp.float32(x_TD), jnp.float32(w_EDF))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("back", [False, True])
def test_equals_ragged_dot(back):
    sizes = SIZES["ragged"]
    x_TD, w_EDF, _ = (jnp.float32(z) for z in inputs(sizes, back, rest=0))
    w = w_EDF.swapaxes(1, 2) if back else w_EDF
    expected = jax.lax.ragged_dot(x_TD, w, jnp.array(sizes))
    found = grouped_matmul(x_TD, w_EDF, jnp.array(sizes), back=back)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("back", [False, True])
def test_the_kernel_for_tpus_computes_what_the_blocks_do(back):
    sizes = jnp.array([1, 130, 0, 40, 3])
    rng = np.random.default_rng(0)
    x_TD = jnp.float32(rng.standard_normal((190, 128)))
    w_EDF = jnp.float32(rng.standard_normal((5, 128, 128)))

    def loss(function):
        return lambda x, w: jnp.sum(jnp.sin(function(x, w)))

    def kernel(x, w):
        return grouped_matmul(x, w, sizes, back=back, kernel="interpreted")

    def blocks(x, w):
        return grouped_matmul(x, w, sizes, back=back)

    np.testing.assert_allclose(kernel(x_TD, w_EDF), blocks(x_TD, w_EDF), atol=1e-3)
    both = [jax.grad(loss(f), argnums=(0, 1))(x_TD, w_EDF) for f in (kernel, blocks)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *both)


def test_the_work_follows_the_rows_not_the_groups():
    """XLA counts a loop's body once, so the test looks for a product of all rows in the text."""
    x_TD, w_EDF = jnp.zeros((4096, D)), jnp.zeros((8, D, F))
    compiled = jax.jit(grouped_matmul).lower(x_TD, w_EDF, jnp.zeros(8, jnp.int32)).compile()
    assert compiled.cost_analysis()["flops"] < 2 * 4096 * D * F
