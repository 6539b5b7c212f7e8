"""From a layer's spec to its module: the one table, which others may add to."""

import sys
from collections.abc import Callable
from typing import Any

from flax import nnx

from modjax.spec import Shape, Spec
from modjax.spec.layer import add_name

MODULES: dict[type[Spec], Callable[..., nnx.Module]] = {}


def register(spec: type[Spec], module: Callable[..., nnx.Module]) -> None:
    """Adds a layer or an end to modjax: its spec, and its text, can stand wherever one can.

    spec: a frozen dataclass, a subclass of modjax.Layer, or of Embedding, Head or Expansion in
    modjax.spec. module: called as module(spec, shape, rngs=rngs), and then as modjax.nn.call says,
    or modjax.nn.ends. A module that is imported again may register its specs again. Raises
    InputError where another spec, such as one of modjax's own, has the name.
    """
    add_name(spec, sys._getframe(1).f_globals)
    MODULES[spec] = module


def build(layer: Spec, shape: Shape, *, rngs: nnx.Rngs) -> Any:
    """Returns the module of a spec."""
    return MODULES[type(layer)](layer, shape, rngs=rngs)
