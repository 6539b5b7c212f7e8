"""From a layer's spec to its module: the one table, which others may add to."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from modjax.spec import Layer, Shape, named

MODULES: dict[type[Layer], Callable[..., nnx.Module]] = {}


def register(spec: type[Layer], module: Callable[..., nnx.Module]) -> None:
    """Adds a layer to modjax: from here on its spec, and its text, can stand wherever one can.

    spec: a frozen dataclass, a subclass of modjax.Layer. module: called as module(spec, shape,
    rngs=rngs), and then as modjax.nn.call says.
    """
    MODULES[spec] = module
    named(spec)


def build(layer: Layer, shape: Shape, *, rngs: nnx.Rngs) -> Any:
    """The module of a spec."""
    return MODULES[type(layer)](layer, shape, rngs=rngs)
