"""Parameters: each says itself where it lies, what it is for, and whether it decays."""

import jax
import jax.numpy as jnp
from flax import nnx


class Measured(nnx.Variable):
    """A number that training measures: it has no gradient and no moments."""


def make_param(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    role: str = "weight",
    decays: bool | None = None,
) -> nnx.Param:
    """A parameter. axes: the logical axis of every dim, for sharding.

    role: what it is for: "weight", "embedding", "norm", "router" or "predictor".
    decays: whether weight decay pulls it to 0; None: where it is a matrix, of two or more dims.
    """
    decays = value.ndim >= 2 if decays is None else decays
    return nnx.Param(value, out_sharding=axes, eager_sharding=False, role=role, decays=decays)


def normal_param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    role: str = "weight",
    decays: bool | None = None,
) -> nnx.Param:
    """Returns a float32 parameter drawn from N(0, std^2); see make_param."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return make_param(value, axes, role=role, decays=decays)


def scale_param(width: int) -> nnx.Param:
    """The scale of a norm: ones."""
    return make_param(jnp.ones((width,), jnp.float32), ("replicated",), role="norm")


def measured(shape: tuple[int, ...]) -> Measured:
    """A measured number, 0 at first, on every device."""
    axes = ("replicated",) * len(shape)
    return Measured(jnp.zeros(shape), out_sharding=axes, eager_sharding=False)
