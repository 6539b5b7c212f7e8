"""The product of a single position, which is taken in parts, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn.layers import project


@pytest.mark.parametrize("width", [1, 6, 16, 44])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_one_position_is_projected_as_many_are(width, dtype, tolerance, out_dtype):
    rng = np.random.default_rng(width)
    w_DF = rng.normal(size=(width, 5)).astype(np.float32)
    x_BLD = jnp.asarray(rng.normal(size=(2, 3, width)), dtype)
    expected_BLF = np.asarray(x_BLD, np.float32) @ np.asarray(jnp.asarray(w_DF, dtype), np.float32)
    size = np.abs(expected_BLF).max()
    for b, t in ((0, 0), (1, 2)):
        one = x_BLD[b : b + 1, t : t + 1]
        y_11F = jax.jit(project, static_argnums=2)(one, w_DF, out_dtype)
        assert y_11F.shape == (1, 1, 5) and y_11F.dtype == (out_dtype or dtype)
        np.testing.assert_allclose(
            np.asarray(y_11F, np.float32)[0, 0], expected_BLF[b, t], atol=tolerance * size
        )
    y_BLF = project(x_BLD, w_DF, out_dtype)
    assert y_BLF.dtype == (out_dtype or dtype)
    np.testing.assert_allclose(np.asarray(y_BLF, np.float32), expected_BLF, atol=tolerance * size)
