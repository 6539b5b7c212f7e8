"""Base class of layer modules, and the table from specs to modules, which users may extend."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from modjax.errors import require
from modjax.nn.call import At, Call, Out
from modjax.specs import Layer, Shape, Spec
from modjax.specs.layer import add_name


class LayerModule(nnx.Module):
    """Base class of layer modules. All methods but the call have neutral defaults."""

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Any = None, /) -> Out:
        """Returns the layer's output, see modjax.nn.call."""
        raise NotImplementedError

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike, /) -> Any:
        """Returns an empty cache for `length` positions: a LayerCache, a dict of them, or ()."""
        return ()

    def split_weights(self) -> None:
        """Unstacks weights of which a decoding step reads only some, such as those of experts."""


MODULES: dict[type[Spec], Callable[..., nnx.Module]] = {}


def register(spec: type[Spec], module: type[nnx.Module]) -> None:
    """Adds a layer, router, rule or end to modjax, usable like modjax's own, also in text.

    spec: a frozen dataclass, a subclass of modjax.Layer, Router or Rule, or of Embedding, Head or
      Expansion in modjax.specs.
    module: constructed as module(spec, shape, rngs=rngs). A router's module also gets outputs=, the
      number of scores that its rule reads of each position. A rule's module also gets capacity=. A
      layer's module must be a subclass of modjax.nn.LayerModule.

    A file that is imported again may register its specs again. Raises InputError for a module of
    another class, and for a name that another spec has, such as one of modjax's own.
    """
    fits = not issubclass(spec, Layer) or issubclass(module, LayerModule)
    require(fits, "modjax.register", module, "must be a subclass of modjax.nn.LayerModule")
    add_name(spec, sys._getframe(1).f_globals)
    MODULES[spec] = module


def build(spec: Spec, shape: Shape, *, rngs: nnx.Rngs, **more: Any) -> Any:
    """Returns the module of a spec. more: further arguments of a router's or a rule's module."""
    return MODULES[type(spec)](spec, shape, rngs=rngs, **more)
