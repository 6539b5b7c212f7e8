"""Both forms of rotary positions against a rotation of complex numbers.

Legend: B batch, L positions, N heads, H head width.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import rotary


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("turned", [8, 6])
def test_rotation_is_that_of_complex_numbers(monkeypatch, platform, turned):
    monkeypatch.setattr(rotary, "target", lambda: platform)
    rng, half = np.random.default_rng(0), turned // 2
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    angle = rng.normal(size=(2, 5, half)).astype(np.float32)
    got = rotary.rotate(jnp.asarray(x), (jnp.cos(angle), jnp.sin(angle)))
    z = (x[..., :half] + 1j * x[..., half:turned]) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([z.real, z.imag, x[..., turned:]], axis=-1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_both_forms_agree_bit_for_bit(monkeypatch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 8)), jnp.bfloat16)
    angle = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.bfloat16)
    plain = rotary.rotate(x, (jnp.cos(angle), jnp.sin(angle)))
    monkeypatch.setattr(rotary, "target", lambda: "tpu")
    np.testing.assert_array_equal(plain, rotary.rotate(x, (jnp.cos(angle), jnp.sin(angle))))
