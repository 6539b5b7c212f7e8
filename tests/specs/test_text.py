"""The text form reads what it is given or refuses it in one line, whatever it is given."""

import pytest

from modjax.errors import InputError
from modjax.specs import ModelSpec, TrainConfig, from_dict
from modjax.specs.layer import NAMES
from modjax.specs.text import read
from tests.specs.small import MODEL, TRAIN

HOSTILE = {
    "Dense(" * 1000 + ")" * 1000: "must have at most 50 brackets open",
    "[" * 60: "must have at most 50 brackets open",
    "Dense(), " * 2000: "must have at most 10000 characters",
    "1+" * 3000 + "1": "must be calls such as",
    "1+" * 800 + "1": "must be calls such as",
    "-" * 5000 + "1": "must be calls such as",
    f"MoD(capacity=0x{'f' * 5000})": "must be finite",
    f"MoD(capacity={'9' * 5000})": "must be calls such as",
    f"MoD(capacity=1{'0' * 400})": "must be finite",
    "MoD(capacity=1e308)": "must be finite",
    "MoD(capacity=-1e308)": "must be finite",
    "MoD(capacity=1j)": "must be calls such as MoD",
    "MoD(capacity=b'x')": "must be calls such as MoD",
    "MoD(capacity=...)": "must be calls such as MoD",
    "\x00": "must be calls such as",
    "\udc80": "must be calls such as",
    "Dense()\x1b[2J": "must be calls such as",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_text_is_refused_in_one_line(text):
    with pytest.raises(InputError) as caught:
        read(text, NAMES, "model.layers")
    said = str(caught.value)
    assert said.startswith("model.layers = ") and HOSTILE[text] in said
    assert said.isprintable() and len(said) < 2000


def test_a_registered_spec_may_raise_anything():
    def fails():
        raise KeyError("a\nb")

    with pytest.raises(InputError, match=r"^layers = 'Fails\(\)': KeyError: 'a\\nb'$"):
        read("Fails()", {"Fails": fails}, "layers")


HUGE = 10**400


@pytest.mark.parametrize(
    ("cls", "base", "changes"),
    [
        (ModelSpec, MODEL, {"d_ff": HUGE}),
        (ModelSpec, MODEL, {"d_ff": 10**5000}),
        (ModelSpec, MODEL, {"norm_eps": HUGE}),
        (ModelSpec, MODEL, {"norm_eps": 1e308}),
        (ModelSpec, MODEL, {"streams": 10**5000}),
        (TrainConfig, TRAIN, {"learning_rate": 1e308}),
        (TrainConfig, TRAIN, {"steps": 2**64}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_number_without_bounds_is_refused_where_it_is_read(cls, base, changes):
    (field,) = changes
    with pytest.raises(InputError, match=rf"^x\.{field} = .*: must be (finite|at most)"):
        from_dict(cls, base | changes, "x.")
