"""Frozen configs from nested mappings and back, checked by name and type."""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from modjax.errors import InputError, is_bounded, require, require_bounded
from modjax.spec.layer import Spec

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config as nested plain dicts, ready for JSON."""
    return {name: _plain(getattr(config, name)) for name in _fields(type(config))}


def canonical(config: Any) -> dict[str, Any]:
    """As to_dict, without the fields that have their default: a new field changes no old form."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = canonical(value) if _is_group(value) else _plain(value)
        if field.default is dataclasses.MISSING or plain != _plain(field.default):
            values[field.name] = plain
    return values


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, Spec)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return to_dict(value) if dataclasses.is_dataclass(value) else value


class _Field(NamedTuple):
    """A field's type; the JSON types that fit it without conversion; whether it has no default."""

    hint: Any
    fitting: frozenset[type]
    needed: bool


@functools.cache
def _fields(cls: type) -> dict[str, _Field]:
    hints, fields = get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        fitting = frozenset({bool, int, float, str, types.NoneType}.intersection(kinds))
        needed = f.default is f.default_factory is dataclasses.MISSING
        fields[f.name] = _Field(hint, fitting, needed)
    return fields


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the frozen config `cls` from nested mappings, checking names and types.

    Raises InputError naming the field for an unknown or missing name, a value of another type,
    or one that the config itself refuses.
    """
    group = path.rstrip(".") or cls.__name__
    require(isinstance(values, Mapping), group, values, "must be a group of fields")
    fields, built = _fields(cls), {}
    for name, value in values.items():
        if name not in fields:
            known = f"unknown; known here: {', '.join(fields)}"
            raise InputError(f"{path}{name}", value, known)
        hint, fitting, _ = fields[name]
        fits = type(value) in fitting and (not isinstance(value, int | float) or is_bounded(value))
        built[name] = value if fits else _convert(hint, value, f"{path}{name}")
    missing = [name for name, field in fields.items() if field.needed and name not in built]
    if missing:
        raise InputError(f"{path}{missing[0]}", None, "missing, and has no default")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:  # the config itself knows what it takes
        require_bounded(where, value)
        return value
    if dataclasses.is_dataclass(hint):
        built = isinstance(value, hint)  # type: ignore[arg-type]
        return value if built else from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), where, value, "must be a list")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if get_origin(hint) is dict:
        require(isinstance(value, Mapping), where, value, "must be a group of fields")
        inner = get_args(hint)[1]
        return {name: _convert(inner, item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= 10**100, where, value, "must be at most 1e100")
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    accepted = hint if isinstance(hint, type | types.UnionType) else object
    ok = isinstance(value, accepted) and not (isinstance(value, bool) and hint is not bool)
    name = getattr(hint, "__name__", str(hint))
    require(ok, where, value, f"must be of type {name}")
    require_bounded(where, value)
    return value
