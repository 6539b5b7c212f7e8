"""Base class of layer modules, and the one table from specs to them, which others may add to."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from modjax.errors import require
from modjax.nn.call import At, Call, Out
from modjax.spec import Layer, Shape
from modjax.spec.layer import add_name


class LayerModule(nnx.Module):
    """Base class of layer modules: the one call, and neutral defaults for the rest."""

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Any = None, /) -> Out:
        """Returns the layer's output, see modjax.nn.call."""
        raise NotImplementedError

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike, /) -> Any:
        """Returns an empty cache for at most `length` positions of each row, () for none."""
        return ()

    def take_apart(self) -> None:
        """Splits weights of which a decode step reads a part only, from now on."""


MODULES: dict[type[Layer], Callable[..., nnx.Module]] = {}


def register(spec: type[Layer], module: type[nnx.Module]) -> None:
    """Adds a layer to modjax: from here on its spec, and its text, can stand wherever one can.

    spec: a frozen dataclass, a subclass of modjax.Layer. module: made as module(spec, shape,
    rngs=rngs), a subclass of modjax.nn.LayerModule. A module that is imported again may register
    its layers again. Raises InputError for another class, and where another layer, such as one of
    modjax's own, has the name.
    """
    fits = not issubclass(spec, Layer) or issubclass(module, LayerModule)
    require(fits, "modjax.register", module, "must be a subclass of modjax.nn.LayerModule")
    add_name(spec, sys._getframe(1).f_globals)
    MODULES[spec] = module


def build(layer: Layer, shape: Shape, *, rngs: nnx.Rngs) -> Any:
    """Returns the module of a spec."""
    return MODULES[type(layer)](layer, shape, rngs=rngs)
