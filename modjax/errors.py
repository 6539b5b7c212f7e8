"""Errors about unusable input, and how any error becomes one printable line."""

import re

MOST_SHOWN = 400  # characters of a value in a message
MOST_SAID = 1000  # characters of what is accepted, which may quote another library
MOST_INTEGER, MOST_NUMBER = 2**63, 1e100  # so that sums and squares of numbers stay finite
LONGEST_NAME = 100  # bytes of a name; a folder's name joins two of them, or one and numbers
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


class InputError(ValueError):
    """Unusable input, as one line: the field, its value and what is accepted."""

    def __init__(self, field: str, value: object, accepted: str):
        self.field, self.value, self.accepted = field, value, accepted
        try:
            text = repr(value)
        except Exception:  # an integer with too many digits, or a class of the user's
            text = f"<{type(value).__name__} that cannot be shown>"
        field, text = one_line(field, MOST_SHOWN), one_line(text, MOST_SHOWN)
        super().__init__(f"{field} = {text}: {one_line(accepted, MOST_SAID)}")


class SharedFault(InputError):
    """Unusable input that would stop every other run of the sweep too."""


class Preempted(Exception):
    """A stop by SIGTERM. The state of `step` is saved, and the same call continues from it."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM at step {step}; state saved")
        self.step = step


def one_line(text: str, most: int) -> str:
    """Returns `text` on one line of about `most` characters; a longer text loses its middle.

    Control characters and lone surrogates become escapes, so that any terminal shows them.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def words(error: BaseException) -> str:
    """Returns `str(error)`, or a substitute if `str` fails."""
    try:
        return str(error)
    except BaseException:  # the class may be the user's
        return "its message cannot be shown"


def describe(error: BaseException) -> str:
    """Returns the type and the message of any exception, on one line."""
    return one_line(f"{type(error).__name__}: {words(error)}".removesuffix(": "), MOST_SAID)


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises InputError unless `condition` holds."""
    if not condition:
        raise InputError(field, value, accepted)


def is_bounded(number: float) -> bool:
    """Returns whether |number| is at most MOST_NUMBER, or MOST_INTEGER for an integer."""
    return abs(number) <= (MOST_NUMBER if isinstance(number, float) else MOST_INTEGER)


def require_bounded(field: str, value: object) -> None:
    """Raises InputError for a number that is not `is_bounded`. Accepts any other value."""
    accepted = f"must be finite, and at most {MOST_NUMBER:g}, or 2**63 for an integer"
    require(not isinstance(value, int | float) or is_bounded(value), field, value, accepted)


def require_name(field: str, name: str, most: int = LONGEST_NAME) -> None:
    """Raises InputError unless `name` can be one component of a path on every system."""
    usable = (
        0 < len(name.encode(errors="replace")) <= most
        and name.isprintable()
        and not set(name) & set('<>:"/\\|?*')
        and name[0] not in ".- "
        and name[-1] not in ". "
        and not _RESERVED.fullmatch(name)
    )
    accepted = (
        f"names a folder: must be 1 to {most} bytes of printable characters, without any of "
        "<>:\"/\\|?*, must not begin with '.', '-' or a space, must not end with '.' or a space, "
        "and must not be a word that Windows reserves"
    )
    require(usable, field, name, accepted)


def require_plain_name(field: str, name: str) -> None:
    """Raises InputError unless `name` passes `require_name` and needs no quotes in a shell."""
    accepted = "must be made of letters, digits, '-', '_' and '.'"
    require(all(c.isalnum() or c in "-_." for c in name), field, name, accepted)
    require_name(field, name)
