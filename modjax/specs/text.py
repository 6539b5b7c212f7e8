"""Reader of the text form of specs, their constructor calls, without eval."""

import ast
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from modjax.errors import InputError, describe, require, require_bounded

# Python's parser overflows its stack on texts that are deep enough.
MOST_CHARACTERS, MOST_DEPTH = 10_000, 50


def bounded(text: str, field: str) -> str:
    """Returns `text` without outer spaces. Raises InputError if it is too long or too deep."""
    short = len(text) <= MOST_CHARACTERS
    require(short, field, text, f"must have at most {MOST_CHARACTERS} characters")
    depth = 0
    for character in text:
        if character in "([{&":  # a chain of & nests too
            depth += 1
        elif character in ")]}":
            depth -= 1
        require(depth <= MOST_DEPTH, field, text, f"must have at most {MOST_DEPTH} brackets open")
    return text.strip()


class UnknownName(InputError):
    """Text that calls a name which no imported module registers."""


def read(text: str, names: Mapping[str, Callable[..., Any]], field: str) -> tuple[Any, ...]:
    """Returns the specs that `text` constructs, such as "Dense(), MoD(Dense())".

    names: classes and functions that `text` may call. Raises UnknownName for another name. Raises
    InputError, which names `field`, for other text than calls with plain values, and for values
    that a spec refuses.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                if name not in names:
                    raise UnknownName(field, name, f"unknown; known: {', '.join(sorted(names))}")
                given: dict[str, Any] = {}
                for keyword in keywords:
                    fits = keyword.arg is not None and keyword.arg not in given
                    accepted = "must name each field once, as NAME=VALUE; ** is not read"
                    require(fits, field, said(node), accepted)
                    given[str(keyword.arg)] = value(keyword.value)
                parts = [value(arg) for arg in args]
                try:
                    return names[name](*parts, **given)
                except (TypeError, InputError) as error:
                    why = _unknown(name, names[name], given) or error
                    raise InputError(field, said(node), str(why)) from error
                except Exception as error:  # a registered spec is the user's code
                    raise InputError(field, said(node), describe(error)) from error
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                one, other = value(left), value(right)
                with contextlib.suppress(Exception):  # a registered spec is the user's code
                    if dataclasses.is_dataclass(one):
                        return one & other  # type: ignore[operator]
            case ast.Tuple(elts=elements):
                return tuple(map(value, elements))
            case ast.Constant(value=None | bool() | int() | float() | str() as plain):
                require_bounded(field, plain)
                return plain
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                require_bounded(field, -number)
                return -number
        raise InputError(field, said(node), "must be calls such as MoD(Dense()), or masks with &")

    def said(node: ast.expr) -> str:
        return ast.get_source_segment(text, node) or text

    text = bounded(text, field)
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(field, text, "must be calls such as Dense(), MoD(Dense())") from error
    return tuple(map(value, body.elts if isinstance(body, ast.Tuple) else [body]))


def _unknown(name: str, make: Callable[..., Any], given: Mapping[str, Any]) -> InputError | None:
    """Returns an error for the first field that `make` does not accept, or None."""
    known = inspect.signature(make).parameters
    for field, value in given.items():
        if field not in known:
            return InputError(f"{name}.{field}", value, f"unknown; known here: {', '.join(known)}")
    return None
