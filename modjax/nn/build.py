"""Base class of layer modules, and the one table from specs to modules, which others may add to."""

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
    """Base class of layer modules: the one call, and neutral defaults for the rest."""

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Any = None, /) -> Out:
        """Returns the layer's output, see modjax.nn.call."""
        raise NotImplementedError

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike, /) -> Any:
        """Returns an empty cache for at most `length` positions of each row, () for none."""
        return ()

    def take_apart(self) -> None:
        """Splits weights of which a decode step reads a part only, from now on."""


MODULES: dict[type[Spec], Callable[..., nnx.Module]] = {}


def register(spec: type[Spec], module: type[nnx.Module]) -> None:
    """Adds a layer, router, rule or end to modjax: it can stand wherever ours can, in text too.

    spec: a frozen dataclass, a subclass of modjax.Layer, Router or Rule, or of Embedding, Head or
    Expansion in modjax.specs.
    module: made as module(spec, shape, rngs=rngs). That of a layer is a subclass of
    modjax.nn.LayerModule; that of a router also gets outputs=, the scores that its rule reads of
    each position; that of a rule gets capacity=.
    A file that is imported again may register its specs again. Raises InputError for another class,
    and where another spec, such as one of modjax's own, has the name.
    """
    fits = not issubclass(spec, Layer) or issubclass(module, LayerModule)
    require(fits, "modjax.register", module, "must be a subclass of modjax.nn.LayerModule")
    add_name(spec, sys._getframe(1).f_globals)
    MODULES[spec] = module


def build(spec: Spec, shape: Shape, *, rngs: nnx.Rngs, **more: Any) -> Any:
    """Returns the module of a spec. more: what routers and rules are given beside the shape."""
    return MODULES[type(spec)](spec, shape, rngs=rngs, **more)
