"""Checks the installed packages against the versions that pyproject.toml accepts."""

import functools
import re
from importlib import metadata

from modjax.errors import require


@functools.cache
def check_packages() -> None:
    """Raises InputError if a required package is missing, too old or too new.

    Reads the records of the installed packages and imports none of them. Accepts everything if
    modjax itself is not installed, because no record then says what it requires.
    """
    try:
        required = metadata.requires("modjax") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in required:
        if ";" in requirement:  # belongs to an extra
            continue
        name, accepted = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = None
        meets = found is not None and all(_meets(found, bound) for bound in accepted.split(","))
        remedy = f"must be installed as {accepted}: pip install '{name}{accepted}'"
        require(meets, name, found, remedy)


def _meets(version: str, bound: str) -> bool:
    """Returns whether a version lies within a bound such as ">=0.10" or "<0.13"."""
    if bound.startswith(">="):
        return _numbers(version) >= _numbers(bound[2:])
    return _numbers(version) < _numbers(bound[1:])


def _numbers(version: str) -> list[int]:
    """Returns the leading numbers of a version, without trailing zeros."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
