"""Marks of arrays that differ between devices, inside a shard_map.

A custom gradient must have the marks of its input, so the inputs get the same marks first. JAX then
sums the gradient over the devices that share an input.
"""

from typing import Any

import jax


def varies_over(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes between whose devices x differs, inside a shard_map."""
    return jax.typeof(x).manual_axis_type.varying  # type: ignore[attr-defined]


def varying(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Returns x, marked as differing between the devices of these mesh axes as well."""
    more = tuple(axes - varies_over(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the arrays, each marked as differing wherever one of them does."""
    axes = frozenset[Any]().union(*map(varies_over, arrays))
    return [varying(x, axes) for x in arrays]
