"""Fields of specs and configs: their conditions, their text, and their plain form."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from modjax.errors import MOST_NUMBER, InputError, is_bounded, require, require_bounded

T = TypeVar("T")


class Accepts(NamedTuple):
    """Condition on a field, for its annotation: Annotated[float, Accepts("must be ...", check)].

    said: accepted values in words, for errors. fits: returns whether a value is accepted. None is
    accepted wherever the type allows it.
    """

    said: str
    fits: Callable[[Any], bool]


Positive = Annotated[T, Accepts("must be greater than 0", lambda value: value > 0)]
NotNegative = Annotated[T, Accepts("must be 0 or more", lambda value: value >= 0)]
Share = Annotated[float, Accepts("must be in (0, 1]", lambda share: 0 < share <= 1)]


def one_of(*names: str) -> Accepts:
    return Accepts(f"must be one of {', '.join(names)}", lambda value: value in names)


class _Field(NamedTuple):
    """Field of a dataclass.

    hint: its type, without conditions. kinds: the members of a union type, or the one type.
    needed: whether the field has no default.
    """

    hint: Any
    kinds: tuple[Any, ...]
    conditions: tuple[Accepts, ...]
    default: Any
    needed: bool


@functools.cache
def _fields(cls: type) -> dict[str, _Field]:
    hints, annotations, fields = get_type_hints(cls), get_type_hints(cls, include_extras=True), {}
    for f in dataclasses.fields(cls):
        hint, metadata = hints[f.name], getattr(annotations[f.name], "__metadata__", ())
        kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
        conditions = tuple(item for item in metadata if isinstance(item, Accepts))
        needed = f.default is f.default_factory is dataclasses.MISSING
        fields[f.name] = _Field(hint, kinds, conditions, f.default, needed)
    return fields


class Spec:
    """Base class of specs: frozen dataclasses that check their fields and have a text form."""

    def __post_init__(self):
        check(self, type(self).__name__, typed=True)

    def __str__(self) -> str:
        """Returns the constructor call, such as `MoD(Dense(), capacity=0.5)`, without defaults.

        The field `parts` or `inner` comes first and has no name.
        """
        first, others = [], []
        for name, field in _fields(type(self)).items():
            value = _number(getattr(self, name), field.kinds)
            if name in ("parts", "inner"):
                first += map(_text, value if isinstance(value, tuple) else [value])
            elif value != field.default:
                others.append(f"{name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(first + others)})"


def _text(value: Any) -> str:
    return str(value) if dataclasses.is_dataclass(value) else repr(value)


def check(config: Any, name: str, *, typed: bool = False) -> None:
    """Raises InputError for a field of a dataclass that its annotation does not accept.

    name: the dataclass in errors. typed: whether to check types too, as from_dict does.
    """
    for field, (_, kinds, conditions, *_) in _fields(type(config)).items():
        value, where = getattr(config, field), f"{name}.{field}"
        if typed:
            types_of = tuple(get_origin(kind) or kind for kind in kinds)
            specs = types_of if isinstance(value, Spec) else ()  # a subclass of a spec fits
            whole = float in kinds and type(value) is int
            if not (type(value) in types_of or isinstance(value, specs) or whole):
                names = ("None" if kind is types.NoneType else kind.__name__ for kind in types_of)
                raise InputError(where, value, f"must be of type {' or '.join(names)}")
            require_bounded(where, value)
        optional = types.NoneType in kinds
        for said, fits in conditions:
            accepted = f"{said}, or None" if optional else said
            require((optional and value is None) or fits(value), where, value, accepted)


def parts(config: Any, *, deep: bool = False) -> Iterator[Spec]:
    """Yields the specs in the fields of a dataclass, in order. deep: also the specs inside."""
    for name in _fields(type(config)):
        value = getattr(config, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Spec):
                yield part
                if deep:
                    yield from parts(part, deep=True)


def canonical(config: Any) -> dict[str, Any]:
    """Returns to_dict(config) without defaults, so that adding a field changes no earlier form.

    Raises InputError for a value of the wrong type.
    """
    # from_dict gives 1 and 1.0 in a float field one form.
    return to_dict(from_dict(type(config), to_dict(config)), defaults=False)


def to_dict(value: Any, *, defaults: bool = True) -> Any:
    """Returns a frozen config as nested plain dicts, ready for JSON, with specs as text.

    defaults: whether to include fields at their defaults.
    """
    if isinstance(value, Spec):
        return str(value)
    if isinstance(value, dict):
        return {name: to_dict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_dict(item) for item in value)
    if not dataclasses.is_dataclass(value):
        return value
    fields = _fields(type(value))  # type: ignore[arg-type]
    plain = {name: to_dict(getattr(value, name), defaults=defaults) for name in fields}
    return {n: item for n, item in plain.items() if defaults or item != to_dict(fields[n].default)}


def _number(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Converts a whole number to the type of its field, float or int; keeps other values."""
    if float in kinds:
        return float(value) if type(value) is int and abs(value) <= MOST_NUMBER else value
    return int(value) if int in kinds and isinstance(value, float) and value.is_integer() else value


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the frozen config `cls` from nested mappings, with checked names and types.

    path: prefix of field names in errors. Raises InputError for an unknown or missing name, a value
    of the wrong type, or one that the config refuses.
    """
    group = path.rstrip(".") or cls.__name__
    require(isinstance(values, Mapping), group, values, "must be a group of fields")
    fields, built = _fields(cls), {}
    for name, value in values.items():
        if name not in fields:
            known = f"unknown; known here: {', '.join(fields)}"
            raise InputError(f"{path}{name}", value, known)
        fits = type(value) in fields[name].kinds
        fits = fits and (not isinstance(value, int | float) or is_bounded(value))
        built[name] = value if fits else _convert(fields[name].hint, value, f"{path}{name}")
    for name, field in fields.items():
        given = name in built or not field.needed
        require(given, f"{path}{name}", None, "missing, and has no default")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), where, value, "must be a list")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if get_origin(hint) is dict:
        require(isinstance(value, Mapping), where, value, "must be a group of fields")
        inner = get_args(hint)[1]
        return {name: _convert(inner, item, f"{where}.{name}") for name, item in value.items()}
    value = _number(value, (hint,))
    huge = hint is float and type(value) is int
    if hint is not Any and not huge:  # a config itself checks its fields of type Any
        accepted = hint if isinstance(hint, type | types.UnionType) else object
        ok = isinstance(value, accepted) and not (isinstance(value, bool) and hint is not bool)
        name = getattr(hint, "__name__", str(hint))
        require(ok, where, value, f"must be of type {name}")
    require_bounded(where, value)
    return value
