"""Tables and claims of README.md, checked against results.json; see experiments/check.py."""

import json
from collections.abc import Iterator

from experiments.tables import markdown
from experiments.tpu_compile.run import RESULTS

KEPT = json.loads(RESULTS.read_text(encoding="utf-8"))
GIB = 2**30
SIZES = ("220M", "1B", "3B")


def share(cell: str, flops: str = "causal") -> float:
    return KEPT[cell]["share_with_kernels"][flops]


def over_dense(cell: str) -> float:
    """Returns the estimated step time over that of the dense model, divided by their FLOP ratio."""
    return share(f"dense-{cell.partition('-')[2]}", "full") / share(cell, "full")


def row(cell: str) -> tuple[str, ...]:
    kept = KEPT[cell]
    mesh = ", ".join(f"{axis} {size}" for axis, size in kept["mesh"].items() if size > 1)
    cycles = (kept["total_cycles"] + kept["kernel_cycles"]) / 1e6
    return (
        cell,
        mesh,
        kept["remat"],
        f"{kept['memory']['total'] / GIB:.1f}",
        f"{cycles:.0f}",
        f"{share(cell):.3f}",
        f"{share(cell, 'full'):.3f}",
        "" if cell.startswith("dense") else f"{over_dense(cell):.3f}",
    )


def tables() -> dict[str, str]:
    header = (
        "cell",
        "mesh",
        "remat",
        "GiB per chip",
        "million cycles",
        "share, causal",
        "share, full",
        "step / dense / FLOP ratio",
    )
    return {"cells": markdown(header, map(row, KEPT))}


def claims() -> Iterator[tuple[str, bool]]:
    dense = {size: f"{share(f'dense-{size}'):.2f}" for size in SIZES}
    yield (
        f"The dense steps reach {dense['220M']}, {dense['1B']} and {dense['3B']} of the peak by "
        "causal FLOPs",
        True,
    )
    mod = {size: f"{over_dense(f'mod12-{size}'):.2f}" for size in SIZES}
    yield (
        f"A MoD step takes {mod['220M']}, {mod['1B']} and {mod['3B']} times what its FLOPs promise",
        True,
    )
    moe = {arm: f"{over_dense(f'{arm}-220M'):.2f}" for arm in ("moe8", "integrated")}
    yield f"{moe['moe8']} for eight experts and {moe['integrated']} for integrated MoDE", True
    yield "Every cell fits", all(kept["memory"]["fits"] for kept in KEPT.values())
    routed = KEPT["mod12-220M"]["collectives"]
    yield (
        "MoD adds no collective on activations",
        not any(one["cause"].endswith(("gather", "scatter", "top_k")) for one in routed),
    )


GIVEN = ("it was 0.21, 0.29 and 0.15",)
