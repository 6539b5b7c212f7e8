"""Base classes of layers and routers, segments of layers, and the names that the text form knows.

A spec is a frozen dataclass that checks itself. It composes by containing other specs.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from modjax.errors import require
from modjax.specs.fields import Spec, parts

C = TypeVar("C", bound=type)


class Origin(NamedTuple):
    """The module that gave a name, and the file that it was read from ("" in a notebook)."""

    module: str
    file: str


NAMES: dict[str, Callable[..., Any]] = {}
ORIGINS: dict[str, Origin] = {}


def add_name(function: Any, scope: Mapping[str, Any]) -> None:
    """Lets the text form call a spec, or a function that makes one, by its name.

    scope: the globals of the module that asks for it. That module may be imported again and give
    the name again. Raises InputError where the name belongs to anything else.
    """
    name, file = function.__name__, scope.get("__file__")
    origin = Origin(scope["__name__"], os.path.realpath(file) if file else "")
    earlier, other = ORIGINS.get(name, origin), NAMES.get(name, function)
    same = (earlier.file or earlier.module) == (origin.file or origin.module)
    same = same and getattr(other, "__qualname__", "") == function.__qualname__
    accepted = f"is a layer of {earlier.file or earlier.module} already: choose another name"
    require(same, "modjax.register", name, accepted)
    NAMES[name], ORIGINS[name] = function, origin


def named(function: Any) -> Any:
    """Decorates a spec, or a function that makes one, so that the text form knows its name."""
    add_name(function, sys._getframe(1).f_globals)
    return function


@dataclass_transform(frozen_default=True)
def spec(cls: C) -> C:
    """Decorates a spec of modjax: makes it a frozen dataclass that the text form knows."""
    made = dataclass(frozen=True)(cls)
    add_name(made, sys._getframe(1).f_globals)
    return made


class Shape(NamedTuple):
    """The numbers that a model's parts share.

    streams: residual streams that the layers see. Only the ends read the rest. width: of the
    embedding and of the features that the head reads. tied: the head reads the embedding's table.
    """

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    streams: int = 1
    vocab_size: int = 0
    width: int = 0
    tied: bool = False


class Load(NamedTuple):
    """Positions of one sequence that a layer computes, and positions whose keys attention makes."""

    tokens: int
    keys: int


class Cost(NamedTuple):
    """One component of a layer, for one sequence.

    forward: FLOPs. backward: in multiples of them; 1 for what passes no gradient on to its input.
    params: learned numbers. active: the share of them that a token uses.
    role: the role of its parameters, see nn/params.py.
    """

    name: str
    forward: float = 0.0
    params: int = 0
    active: float = 1.0
    backward: float = 2.0
    role: str = "weight"


Costs = Iterator[Cost]


class Layer(Spec):
    """Base class of layers. A layer defines `cost`; the layers inside decide all that it omits."""

    def inside(self) -> tuple["Layer", ...]:
        """Returns the layers in its fields, a router included, in order."""
        return tuple(part for part in parts(self) if isinstance(part, Layer))

    def check(self, shape: Shape) -> None:
        """Raises InputError where the layer cannot have this shape."""
        around = any(not isinstance(layer, Router) for layer in self.inside())
        accepted = "works on one residual stream: with model.streams it needs AltUp around it"
        require(shape.streams == 1 or around, "model.layers", str(self), accepted)
        for layer in self.inside():
            layer.check(shape)

    def cost(self, shape: Shape, load: Load) -> Costs:
        raise NotImplementedError

    def looks_ahead(self, routing: str) -> bool:
        """Returns whether a position may depend on later ones. routing: "trained" or "causal"."""
        return any(layer.looks_ahead(routing) for layer in self.inside())

    def names(self) -> tuple[str, ...]:
        """Returns the names of its own ways to select without the future, see Rule.names."""
        return ()

    def routed(self) -> int:
        """Returns how many selections a position passes on its way through this layer."""
        return sum(layer.routed() for layer in self.inside())

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        """Returns the size of the caches of a sequence of at most `length` tokens."""
        return sum(layer.cache_numbers(shape, length, slack) for layer in self.inside())

    def ropes(self) -> frozenset[float]:
        """Returns the bases of the rotary tables that the layer reads."""
        return frozenset().union(*(layer.ropes() for layer in self.inside()))

    def hands_on(self) -> frozenset[str]:
        """Returns the names of values that the layer passes to later layers."""
        return frozenset().union(*(layer.hands_on() for layer in self.inside()))

    def needs(self) -> frozenset[str]:
        """Returns the names of values that earlier layers must pass to this one."""
        found: frozenset[str] = frozenset()
        handed: frozenset[str] = frozenset()
        for layer in self.inside():
            found |= layer.needs() - handed
            handed |= layer.hands_on()
        return found


class Router(Layer):
    """Base class of routers: layers that make some scores of every position."""

    def check(self, shape: Shape) -> None:
        super().check(shape._replace(streams=1))

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Costs:
        """Yields the costs of a router that makes `outputs` scores of each position."""
        numbers = shape.d_model * outputs
        yield Cost("router", 2.0 * load.tokens * numbers, numbers, role="router")

    def hands_on(self) -> frozenset[str]:
        return frozenset()  # of a router, only the scores are used


def check_parts(name: str, parts: tuple[Any, ...]) -> None:
    """Raises InputError unless they are layers, at least one."""
    require(len(parts) > 0, name, parts, "must contain a layer")
    for part in parts:
        require(isinstance(part, Layer), name, part, "must contain layers")


@spec
class Repeat(Spec):
    """A segment of a model: `parts`, in this order, `times` times over.

    One segment of a model may leave `times` open (None), and takes what the depth leaves.
    """

    parts: tuple[Layer, ...]
    times: int | None = None

    def __init__(self, *parts: Layer, times: int | None = None):
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "times", times)
        check_parts("Repeat", parts)
        fits = times is None or (type(times) is int and times > 0)
        require(fits, "Repeat.times", times, "must be greater than 0, or left out")
