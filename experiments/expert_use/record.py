"""Tables and claims of README.md, checked against the kept numbers; see experiments/check.py."""

import json
from collections.abc import Iterator
from pathlib import Path

from experiments.tables import markdown

FOUND = json.loads((Path(__file__).parent / "stdlib.json").read_text(encoding="utf-8"))
LAYERS = FOUND["layers"]


def tables() -> dict[str, str]:
    names = ("bits_that_a_token_tells_of_its_expert", "bits_of_the_expert")
    rows = (
        (i, f"{passed:.0%}", *(f"{layer[name]:.2f}" for name in names))
        for i, (passed, layer) in enumerate(zip(FOUND["no_op_share_by_layer"], LAYERS, strict=True))
    )
    columns = ("layer", "no-op share", "mutual information with the byte, bits", "entropy, bits")
    return {"layers": markdown(columns, rows)}


def claims() -> Iterator[tuple[str, bool]]:
    passed = FOUND["no_op_share_by_layer"]
    share = f"{min(passed):.0%} to {max(passed):.0%}"
    yield f"{share} of the picks in every layer are no-ops", 0.4 < min(passed) < max(passed) < 0.6
    yield (
        "The first two layers pass most, the last two least",
        sorted(passed)[-2:] == sorted(passed[:2]) and sorted(passed)[:2] == sorted(passed[-2:]),
    )
    most, least = dict(FOUND["passed_most"]), dict(FOUND["passed_least"])
    others = [most[piece] for piece in "yfdn"]
    yield (
        f"`e` passes {most['e']:.0%} of the time, `t` {most['t']:.0%}, and `y`, `f`, `d`, `n` "
        f"{min(others):.0%} to {max(others):.0%}",
        list(most)[:6] == list("etyfdn"),
    )
    yield (
        f"`[` passes {least['[']:.0%} of the time, `/` {least['/']:.0%}, `v` {least['v']:.0%}",
        list(least)[:3] == list("[/v"),
    )
    bits = [layer["bits_that_a_token_tells_of_its_expert"] for layer in LAYERS]
    yield f"{bits[0]:.2f} bits in the first layer", bits[0] == max(bits)
    yield f"{min(bits):.2f} bits in layer 5", bits.index(min(bits)) == 5


# From the run's own record and metrics, which are not kept.
GIVEN = (
    "(65.5k bytes)",
    "validation loss of 1.353 nats per byte",
    "from 2.6 times the mean to 1.24 times",
    "dropped picks from 24% to 8%",
    "passes 33%",
)
