"""The products of activations and matrices, also of one position, which is taken in parts on a CPU.

Legend: B batch, L positions, D width, F output width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import product, project, project_back


@pytest.mark.parametrize("width", [1, 6, 44, 512])
@pytest.mark.parametrize("dtype, rounding", [("float32", 0.0), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("positions", [slice(0, 1), slice(0, 3)])
def test_products_equal_numpy_and_are_rounded_once(width, dtype, rounding, positions):
    rng = np.random.default_rng(width)
    w_DF = jnp.asarray(rng.normal(size=(width, 64)), dtype)
    x_BLD = jnp.asarray(rng.normal(size=(1, 3, width)), dtype)[:, positions]
    exact_BLF = np.asarray(x_BLD, np.float64) @ np.asarray(w_DF, np.float64)
    bound_BLF = rounding * np.abs(exact_BLF) + 1e-6 * np.abs(exact_BLF).max()
    for y_BLF in (jax.jit(project)(x_BLD, w_DF), jax.jit(project_back)(x_BLD, w_DF.T)):
        assert y_BLF.dtype == dtype
        assert np.all(np.abs(np.asarray(y_BLF, np.float64) - exact_BLF) <= bound_BLF)
    y_BLF = jax.jit(product, static_argnums=2)(x_BLD, w_DF, jnp.float32)
    assert y_BLF.dtype == jnp.float32
    np.testing.assert_allclose(y_BLF, exact_BLF, atol=1e-6 * np.abs(exact_BLF).max())
