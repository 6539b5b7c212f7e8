"""Tables and claims of README.md, held against the kept numbers; see experiments/check.py."""

import json
from collections.abc import Iterator
from pathlib import Path

from experiments.tables import markdown

FOUND = json.loads((Path(__file__).parent / "stdlib.json").read_text(encoding="utf-8"))
LAYERS = FOUND["layers"]


def tables() -> dict[str, str]:
    rows = (
        (i, f"{passed:.0%}", f"{layer['bits_that_a_token_tells_of_its_expert']:.2f}",
         f"{layer['bits_of_the_expert']:.2f}")
        for i, (passed, layer) in enumerate(zip(FOUND["no_op_share_by_layer"], LAYERS, strict=True))
    )  # fmt: skip
    columns = ("layer", "passed", "bits that the byte tells of the choice", "bits of the choice")
    return {"layers": markdown(columns, rows)}


def claims() -> Iterator[tuple[str, bool]]:
    passed = FOUND["no_op_share_by_layer"]
    yield (
        f"{min(passed):.0%} to {max(passed):.0%} in every layer",
        0.4 < min(passed) < max(passed) < 0.6,
    )
    yield (
        "the first two layers pass most, the last two least",
        sorted(passed)[-2:] == sorted(passed[:2]) and sorted(passed)[:2] == sorted(passed[-2:]),
    )
    most, least = dict(FOUND["passed_most"]), dict(FOUND["passed_least"])
    others = [most[piece] for piece in "yfdn"]
    yield (
        f"`e` {most['e']:.0%}, `t` {most['t']:.0%}, `y`, `f`, `d`, `n` {min(others):.0%} to "
        f"{max(others):.0%}",
        list(most)[:6] == list("etyfdn"),
    )
    yield (
        f"`[` passes {least['[']:.0%} of the time, `/` {least['/']:.0%}, `v` {least['v']:.0%}",
        list(least)[:3] == list("[/v"),
    )
    bits = [layer["bits_that_a_token_tells_of_its_expert"] for layer in LAYERS]
    yield f"{bits[0]:.2f} bits in the first, {min(bits):.2f} at the least", bits[0] == max(bits)
    yield "layer 5", bits.index(min(bits)) == 5


# Of the run's own record and metrics, which are not kept.
GIVEN = (
    "(65.5k bytes)",
    "validation loss 1.353 nats per byte",
    "2.6 times the mean at first and 1.24 times at the end; drops fall from 24% to 8%",
    "passes 33%",
)
