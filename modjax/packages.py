"""The installed packages, held against what pyproject.toml accepts."""

import functools
import re
from importlib import metadata

from modjax.errors import require


@functools.cache
def check_packages() -> None:
    """Raises InputError where a needed package is missing, too old or too new.

    Compares what is recorded of the installed packages, and imports none of them. Where modjax
    itself is not installed, nothing is recorded of its needs and all is accepted.
    """
    try:
        needed = metadata.requires("modjax") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in needed:
        if ";" in requirement:  # of an extra
            continue
        name, accepted = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = None
        require(
            found is not None and all(_meets(found, bound) for bound in accepted.split(",")),
            name,
            found,
            f"must be installed as {accepted}: pip install '{name}{accepted}'",
        )


def _meets(version: str, bound: str) -> bool:
    """Returns whether a version lies within a bound such as ">=0.10" or "<0.13"."""
    if bound.startswith(">="):
        return _numbers(version) >= _numbers(bound[2:])
    return _numbers(version) < _numbers(bound[1:])


def _numbers(version: str) -> list[int]:
    """Returns the leading numbers of a version without zeros at the end."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
