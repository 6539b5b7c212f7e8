"""Input that cannot be used, and how errors are shown: on one line that can be printed."""

import re

MOST_SHOWN = 400  # characters of a value in a message
MOST_SAID = 1000  # characters of what is accepted, which may be quoted from other libraries
MOST_INTEGER, MOST_NUMBER = 2**63, 1e100  # so that sums and squares of numbers stay finite
LONGEST_NAME = 100  # bytes of a name; folders are named by two, or by one and numbers
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


class InputError(ValueError):
    """Input that cannot be used: one line with the field, its value and what would be accepted."""

    def __init__(self, field: str, value: object, accepted: str):
        self.field, self.value, self.accepted = field, value, accepted
        try:
            text = repr(value)
        except Exception:  # an integer of very many digits, or a class of the user's
            text = f"<{type(value).__name__} that cannot be shown>"
        fields = one_line(field, MOST_SHOWN), one_line(text, MOST_SHOWN)
        super().__init__(f"{fields[0]} = {fields[1]}: {one_line(accepted, MOST_SAID)}")


def one_line(text: str, most: int) -> str:
    """Returns `text` on one line of about `most` characters, without its middle where it is longer.

    Control characters and lone surrogates become their escapes, so that a terminal shows them.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 2 :]}"
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def words(error: BaseException) -> str:
    """Returns `str(error)`, or a substitute where `str` fails."""
    try:
        return str(error)
    except BaseException:  # the class may be the user's
        return "its message cannot be shown"


def describe(error: BaseException) -> str:
    """Returns the type and the words of any exception, on one line."""
    return one_line(f"{type(error).__name__}: {words(error)}".removesuffix(": "), MOST_SAID)


class SharedFault(InputError):
    """Bad input that would stop every other run of the sweep, too: its data or folder is gone."""


class Preempted(Exception):
    """SIGTERM arrived: the state of `step` is saved, and the same call goes on from there."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM at step {step}; state saved")
        self.step = step


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, value, accepted)


def is_bounded(number: float) -> bool:
    """Whether a number can be computed with: an integer of 64 bits, or a float of some size."""
    return abs(number) <= (MOST_NUMBER if isinstance(number, float) else MOST_INTEGER)


def require_bounded(field: str, value: object) -> None:
    """Raises InputError for a number that is not finite, or beyond all that a spec can mean."""
    accepted = f"must be finite, and at most {MOST_NUMBER:g}, or 2**63 for an integer"
    require(not isinstance(value, int | float) or is_bounded(value), field, value, accepted)


def require_name(field: str, name: str, most: int = LONGEST_NAME) -> None:
    """Raises InputError unless `name` can be one part of a path on every system."""
    usable = (
        0 < len(name.encode(errors="replace")) <= most
        and name.isprintable()
        and not set(name) & set('<>:"/\\|?*')
        and name[0] not in ".- "
        and name[-1] not in ". "
        and not _RESERVED.fullmatch(name)
    )
    accepted = (
        f"names a folder: must be 1 to {most} bytes of printable characters, without any "
        "of <>:\"/\\|?*, '.', '-' or space in front, '.' or space at the end, and no word that "
        "Windows reserves"
    )
    require(usable, field, name, accepted)


def require_plain_name(field: str, name: str) -> None:
    """Raises InputError unless `name` is as for `require_name`, and needs no quotes in a shell."""
    accepted = "must be made of letters, digits, '-', '_' and '.'"
    require(all(c.isalnum() or c in "-_." for c in name), field, name, accepted)
    require_name(field, name)
