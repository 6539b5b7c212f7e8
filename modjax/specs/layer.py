"""Base classes of layers and routers, segments of layers, and the registry of spec names.

A spec is a frozen dataclass that checks its fields. Specs compose by containing other specs.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from modjax.errors import require
from modjax.specs.fields import Spec, parts

C = TypeVar("C", bound=type)


class Origin(NamedTuple):
    """Module that registered a name, and its file ("" in a notebook)."""

    module: str
    file: str


NAMES: dict[str, Callable[..., Any]] = {}
ORIGINS: dict[str, Origin] = {}


def add_name(function: Any, scope: Mapping[str, Any]) -> None:
    """Registers a spec, or a function that makes one, by its name for the text form.

    scope: globals of the calling module. If it is imported again, it may register the name again.
    Raises InputError for a name that another module or class has registered.
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
    """Decorates a spec, or a function that makes one: registers it for the text form."""
    add_name(function, sys._getframe(1).f_globals)
    return function


@dataclass_transform(frozen_default=True)
def spec(cls: C) -> C:
    """Decorates a class of modjax: makes it a frozen dataclass, registered for the text form."""
    made = dataclass(frozen=True)(cls)
    add_name(made, sys._getframe(1).f_globals)
    return made


class Shape(NamedTuple):
    """Sizes that the parts of a model share.

    streams: number of residual streams that the layers see.
    Only the ends read vocab_size, width and tied.
    width: width of the embedding and of the features that the head reads.
    tied: whether the head reads the table of the embedding.
    norm_eps, norm_offset: see ModelSpec.
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
    norm_offset: float = 0.0


class Load(NamedTuple):
    """Work on one sequence.

    tokens: number of positions computed. keys: number of positions with computed keys.
    trains: whether for training, for which some layers compute more.
    """

    tokens: int
    keys: int
    trains: bool = True


class Cost(NamedTuple):
    """Cost of one component of a layer, for one sequence.

    name: name of the component, such as "mlp".
    forward: FLOPs of a forward pass.
    params: number of parameters.
    active: share of the parameters that a token uses.
    backward: FLOPs of a backward pass, in multiples of `forward`: 2, or 1 without a gradient of the
      input.
    role: role of the parameters, see nn/params.py.
    """

    name: str
    forward: float = 0.0
    params: int = 0
    active: float = 1.0
    backward: float = 2.0
    role: str = "weight"


Costs = Iterator[Cost]


class Layer(Spec):
    """Base class of layers. A layer defines `cost`; the other methods ask the layers inside it."""

    def inside(self) -> tuple["Layer", ...]:
        """Returns the layers in its fields, routers included, in order."""
        return tuple(part for part in parts(self) if isinstance(part, Layer))

    def check(self, shape: Shape) -> None:
        """Raises InputError for a shape that the layer does not support."""
        around = any(not isinstance(layer, Router) for layer in self.inside())
        accepted = "works on one residual stream: with model.streams it needs AltUp around it"
        require(shape.streams == 1 or around, "model.layers", str(self), accepted)
        for layer in self.inside():
            layer.check(shape)

    def cost(self, shape: Shape, load: Load) -> Costs:
        """Yields the costs of the layer's components for one sequence."""
        raise NotImplementedError

    def looks_ahead(self, routing: str) -> bool:
        """Returns whether a position may depend on later ones. routing: "trained" or "causal"."""
        return any(layer.looks_ahead(routing) for layer in self.inside())

    def causal_rules(self) -> tuple[str, ...]:
        """Returns the names of this layer's causal rules, see Rule.causal_rules."""
        return ()

    def routed(self) -> int:
        """Returns the largest number of routed layers that can process one position."""
        return sum(layer.routed() for layer in self.inside())

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        """Returns the number of cached array elements for a sequence of at most `length` tokens.

        slack: a routed layer caches slack * capacity * length positions; None caches all.
        """
        return sum(layer.cache_numbers(shape, length, slack) for layer in self.inside())

    def ropes(self) -> frozenset[Any]:
        """Returns the rotary positions (Rope) that the layer reads."""
        return frozenset().union(*(layer.ropes() for layer in self.inside()))

    def passes_on(self) -> frozenset[str]:
        """Returns the names of values that the layer passes to later layers."""
        return frozenset().union(*(layer.passes_on() for layer in self.inside()))

    def needs(self) -> frozenset[str]:
        """Returns the names of values that earlier layers must pass to this one."""
        found: frozenset[str] = frozenset()
        passed: frozenset[str] = frozenset()
        for layer in self.inside():
            found |= layer.needs() - passed
            passed |= layer.passes_on()
        return found


class Router(Layer):
    """Base class of routers: layers that score every position."""

    def check(self, shape: Shape) -> None:
        super().check(shape._replace(streams=1))

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Costs:
        """Yields the costs of a router with `outputs` scores per position."""
        numbers = shape.d_model * outputs
        yield Cost("router", 2.0 * load.tokens * numbers, numbers, role="router")

    def passes_on(self) -> frozenset[str]:
        return frozenset()  # only the scores leave a router


def check_parts(name: str, parts: tuple[Any, ...]) -> None:
    """Raises InputError unless `parts` contains only layers, and at least one."""
    require(len(parts) > 0, name, parts, "must contain a layer")
    for part in parts:
        require(isinstance(part, Layer), name, part, "must contain layers")


@spec
class Repeat(Spec):
    """Segment of a model: a pattern of layers, repeated.

    parts: layers, at least one, as positional arguments.
    times: number of repetitions, greater than 0. One segment of a model may leave it out (None) and
      then fills the rest of the depth.
    """

    parts: tuple[Layer, ...]
    times: int | None = None

    def __init__(self, *parts: Layer, times: int | None = None):
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "times", times)
        check_parts("Repeat", parts)
        fits = times is None or (type(times) is int and times > 0)
        require(fits, "Repeat.times", times, "must be greater than 0, or left out")


def segments_of(layers: Sequence[Layer]) -> tuple[Repeat, ...]:
    """Returns segments with these layers: the shortest pattern that repeats, and its rest."""
    depth = len(layers)
    fits = (p for p in range(1, depth) if layers[p:] == layers[:-p])
    period = next(fits, depth)
    whole = depth - depth % period
    found = [Repeat(*layers[:period], times=whole // period)]
    if 2 * period > depth:  # no pattern: runs of equal layers
        found = [Repeat(one, times=len(list(run))) for one, run in itertools.groupby(layers)]
    elif whole < depth:
        found.append(Repeat(*layers[whole:], times=1))
    return tuple(found)
