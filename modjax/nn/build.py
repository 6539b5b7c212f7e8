"""The one table from specs to their modules, to which others may add."""

import sys
from collections.abc import Callable
from typing import Any

from flax import nnx

from modjax.spec import Shape, Spec
from modjax.spec.layer import add_name

MODULES: dict[type[Spec], Callable[..., nnx.Module]] = {}


def register(spec: type[Spec], module: Callable[..., nnx.Module]) -> None:
    """Adds a layer, router or rule to modjax: its spec, and its text, can stand wherever ours can.

    spec: a frozen dataclass, a subclass of modjax.Layer, Router or Rule.
    module: called as module(spec, shape, rngs=rngs), and then as modjax.nn.call says. A router also
    gets outputs=, the scores that its rule reads of each position; a rule gets capacity=.
    A file that is imported again may register its specs again. Raises InputError where another
    spec, such as one of modjax's own, has the name.
    """
    add_name(spec, sys._getframe(1).f_globals)
    MODULES[spec] = module


def build(spec: Spec, shape: Shape, *, rngs: nnx.Rngs, **more: Any) -> Any:
    """Returns the module of a spec. more: what routers and rules are given beside the shape."""
    return MODULES[type(spec)](spec, shape, rngs=rngs, **more)
