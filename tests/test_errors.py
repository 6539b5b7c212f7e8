"""Errors can be shown for any value, name or exception."""

import pytest

from modjax.errors import InputError, describe, is_bounded, require_bounded, require_name


class Mute:
    def __repr__(self):
        raise RuntimeError("no text")


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        ("a\nb\x1b[31m\udc80", "'a\\nb\\x1b[31m\\udc80'"),
        (10**5000, "<int that cannot be shown>"),  # Python refuses to print it
        (Mute(), "<Mute that cannot be shown>"),
        ("x" * 5000, f"'{'x' * 199}...{'x' * 199}'"),
    ],
    ids=lambda value: type(value).__name__,  # pytest prints integers, too
)
def test_any_value_has_a_line(value, shown):
    assert str(InputError("field", value, "must differ")) == f"field = {shown}: must differ"


def test_a_field_and_what_is_accepted_are_one_line_that_can_be_printed():
    said = str(InputError("a\x1b[2J\udc80" + "f" * 9000, 1, "one\n  two " + "x" * 9000))
    assert said.startswith("a\\x1b[2J\\udc80ff") and ": one two xx" in said
    assert said.isprintable() and len(said) < 2000
    said.encode()


def test_any_exception_has_a_line():
    assert describe(ValueError("a\nb")) == "ValueError: a b"
    assert describe(SystemExit()) == "SystemExit"
    assert describe(MuteError()) == "MuteError: its message cannot be shown"


NAMES = [
    "dense",
    "mod12",
    "my corpus",
    "köln_1.5",
    "dense-1e+12-d64-l4-00000000",
    "a" * 100,
    "con2",
]
NO_NAMES = [
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    ".hidden",
    "-rf",
    " a",
    "a ",
    "a.",
    "a\n",
    "a\x00",
    "\udc80",
    "\u202eabc",
    "a:b",
    "a*",
    "a?",
    'a"',
    "a|b",
    "CON",
    "nul.txt",
    "com1",
    "a" * 101,
    "ä" * 51,
]


def test_a_name_is_one_printable_part_of_a_path_on_every_system():
    for name in NAMES:
        require_name("name", name)
    for name in NO_NAMES:
        with pytest.raises(InputError, match=r"^name = .*: names a folder: must be 1 to 100 bytes"):
            require_name("name", name)


def test_a_number_is_bounded():
    for number in (0, -1, 2**63, 1e100, -1e100, 5e-324, True):
        assert is_bounded(number)
        require_bounded("n", number)
    for number in (2**63 + 1, -(10**400), 1.1e100, float("inf"), float("nan")):
        assert not is_bounded(number)
        with pytest.raises(InputError, match=r"^n = .*: must be finite"):
            require_bounded("n", number)
    require_bounded("n", "text")
