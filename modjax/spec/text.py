"""The text form of a spec: its constructor call, written and read without eval."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

from modjax.errors import InputError, require


def write(spec: Any) -> str:
    """`MoD(Dense(), capacity=0.5)`: fields that have their default are left out.

    What a spec contains, its field `parts` or `inner`, comes first and without a name.
    """
    first, named = [], []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("parts", "inner"):
            first += map(_one, value if isinstance(value, tuple) else [value])
        elif value != field.default:
            if type(value) is int and float in (get_args(field.type) or (field.type,)):
                value = float(value)  # equal specs have one text
            named.append(f"{field.name}={_one(value)}")
    return f"{type(spec).__name__}({', '.join(first + named)})"


def _one(value: Any) -> str:
    return str(value) if dataclasses.is_dataclass(value) else repr(value)


def read(text: str, names: Mapping[str, Callable[..., Any]], field: str) -> tuple[Any, ...]:
    """Returns the specs that `text`, such as "Dense(), MoD(Dense())", calls by `names`.

    Raises InputError naming `field` for anything but calls of these names with plain values, and
    for values that a spec refuses.
    """

    def finite(plain: Any) -> Any:
        fits = not isinstance(plain, int | float) or abs(plain) < 1e308
        require(fits, field, plain, "must be finite")
        return plain

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                if name not in names:
                    raise InputError(field, name, f"unknown; known: {', '.join(sorted(names))}")
                given = {k.arg: value(k.value) for k in keywords if k.arg is not None}
                parts = [value(arg) for arg in args]
                try:
                    return names[name](*parts, **given)
                except (TypeError, InputError) as error:
                    said = _unknown(name, names[name], given) or error
                    raise InputError(field, ast.unparse(node), str(said)) from error
            case ast.Constant(value=plain):
                return finite(plain)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return finite(-number)
        raise InputError(field, ast.unparse(node), "must be calls such as MoD(Dense())")

    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(field, text, "must be calls such as Dense(), MoD(Dense())") from error
    return tuple(map(value, body.elts if isinstance(body, ast.Tuple) else [body]))


def _unknown(name: str, make: Callable[..., Any], given: Mapping[str, Any]) -> InputError | None:
    """Returns the error of the first field that `make` does not know, None where it knows all."""
    known = inspect.signature(make).parameters
    for field, value in given.items():
        if field not in known:
            return InputError(f"{name}.{field}", value, f"unknown; known here: {', '.join(known)}")
    return None
