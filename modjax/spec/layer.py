"""Base classes of specs: checks and text of all; costs, routings and caches of layers.

A spec is a frozen dataclass that checks itself. It composes by containing other specs.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from modjax.errors import require, require_bounded
from modjax.spec import text


class Shape(NamedTuple):
    """The numbers that a model's parts share.

    streams: how many residual streams the layers see. Only the ends read the rest: vocab_size,
    width (of a row of the embedding, and of the features), and whether the head is tied to it.
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
    role: as nn.layers.normal_param has it, for what is trained.
    """

    name: str
    forward: float = 0.0
    params: int = 0
    active: float = 1.0
    backward: float = 2.0
    role: str = "weight"


class Spec:
    """Base class of the values that describe a model: each checks its fields and has a text."""

    def __post_init__(self):
        check_types(self, type(self).__name__)

    def __str__(self) -> str:
        return text.write(self)


class Layer(Spec):
    """Base class of layers. `inside` names the layers that it contains; the rest follows."""

    def inside(self) -> tuple["Layer", ...]:
        return ()

    def check(self, shape: Shape) -> None:
        """Raises InputError where the layer cannot have this shape."""
        fits = shape.streams == 1 or len(self.inside()) > 0
        accepted = "works on one residual stream: with model.streams it needs AltUp around it"
        require(fits, "model.layers", str(self), accepted)
        for layer in self.inside():
            layer.check(shape)

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        raise NotImplementedError

    def looks_ahead(self, routing: str) -> bool:
        """Returns whether a position may depend on later ones. routing: "trained" or "causal"."""
        return any(layer.looks_ahead(routing) for layer in self.inside())

    def rules(self) -> frozenset[str]:
        """Returns the names of the causal rules that a call can ask of something in this layer."""
        return frozenset().union(*(layer.rules() for layer in self.inside()))

    def own_rules(self) -> frozenset[str]:
        """Returns the names of the rules that "causal" routing uses in this layer."""
        return frozenset().union(*(layer.own_rules() for layer in self.inside()))

    def routed(self) -> int:
        """How many selections lie on a position's way through this layer."""
        return sum(layer.routed() for layer in self.inside())

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        """Numbers that the caches of a sequence of at most `length` tokens hold."""
        return sum(layer.cache_numbers(shape, length, slack) for layer in self.inside())

    def ropes(self) -> frozenset[float]:
        """Bases of the rotary tables that it looks at."""
        return frozenset().union(*(layer.ropes() for layer in self.inside()))

    def hands_on(self) -> frozenset[str]:
        """Names of what the layer hands on to those after it."""
        return frozenset().union(*(layer.hands_on() for layer in self.inside()))

    def needs(self) -> frozenset[str]:
        """Names of what an earlier layer must have handed on."""
        found: frozenset[str] = frozenset()
        handed: frozenset[str] = frozenset()
        for layer in self.inside():
            found |= layer.needs() - handed
            handed |= layer.hands_on()
        return found


def check_types(spec: Any, name: str) -> None:
    """Raises InputError where a field of a dataclass is not what its annotation says."""
    for field, kinds, said in _types(type(spec)):
        value = getattr(spec, field)
        whole = float in kinds and type(value) is int
        specs = tuple(kind for kind in kinds if issubclass(kind, Spec))
        fits = whole or type(value) in kinds or isinstance(value, specs)
        require(fits, f"{name}.{field}", value, f"must be {said}")
        require_bounded(f"{name}.{field}", value)


@functools.cache
def _types(cls: type) -> list[tuple[str, tuple[type, ...], str]]:
    """Of each field its name, the types that it may have, and how to say so."""
    hints, found = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        said = " or ".join("None" if k is NoneType else k.__name__ for k in kinds)
        found.append((field.name, kinds, f"of type {said}"))
    return found


def check_parts(name: str, parts: tuple[Any, ...]) -> None:
    """Raises InputError unless they are layers, at least one."""
    require(len(parts) > 0, name, parts, "must contain a layer")
    for part in parts:
        require(isinstance(part, Layer), name, part, "must contain layers")


@dataclass(frozen=True, init=False)
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
        require(
            times is None or (type(times) is int and times > 0),
            "Repeat.times",
            times,
            "must be greater than 0, or left out",
        )


class Origin(NamedTuple):
    """Where a name was given: the module, and the file that it was read from ("" in a notebook)."""

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


named(Repeat)
