"""Parameters, which carry their logical axes, their role and whether they decay."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax.sharding import gathered


class Measured(nnx.Variable):
    """Variable that training measures, such as a threshold; it has no gradient."""


def make_param(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    role: str = "weight",
    decays: bool | None = None,
    transposed: bool = False,
) -> nnx.Param:
    """Returns a parameter. axes: the logical axis of every dim, for sharding.

    role: "weight", "embedding", "norm", "router" or "predictor".
    decays: whether weight decay applies; None means that it does for two or more dims.
    transposed: whether a matrix is stored as (out, in), see modjax.nn.weights.
    """
    decays = value.ndim >= 2 if decays is None else decays
    about = {"role": role, "decays": decays, "transposed": transposed}
    return nnx.Param(value, out_sharding=axes, eager_sharding=False, **about)


def read(param: nnx.Variable, dtype: DTypeLike = jnp.float32, *, whole: bool = True) -> jax.Array:
    """Returns a parameter in the dtype to compute in. Layers read all weights through this.

    Trained weights are stored in float32, frozen ones in the model's dtype.

    whole: whether to gather the parts that lie on the mesh axis "fsdp", after the cast. XLA would
      split the product over these parts instead, into a loop of small ones.
    """
    value = param[...].astype(dtype)
    axes = param.get_metadata("out_sharding", None)
    # A layer of a scan has lost the dim "layers", which comes first.
    return gathered(value, axes[len(axes) - value.ndim :]) if whole and axes else value


def normal_param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    **about: Any,
) -> nnx.Param:
    """Returns a float32 parameter drawn from N(0, std^2). about: see make_param."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return make_param(value, axes, **about)


def bias_param(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter of zeros, which does not decay."""
    return make_param(jnp.zeros(shape, jnp.float32), axes, decays=False)


def measured(shape: tuple[int, ...]) -> Measured:
    """Returns a Measured of zeros, replicated on every device."""
    axes = ("replicated",) * len(shape)
    return Measured(jnp.zeros(shape), out_sharding=axes, eager_sharding=False)
