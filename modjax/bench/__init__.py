"""`modjax bench`: every performance figure of the project, as ratios taken in one run.

Each benchmark is a function that returns rows; a row that could not be measured has no value and
says why. Nothing here is a test: machines differ, and these figures are for people to read.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from typing import Any

from modjax.config import InputError

# name -> the module of modjax.bench whose `measure()` returns the rows.
BENCHMARKS = {
    "startup": "time to import modjax against jax and flax alone",
    "step": "train step: MoD against dense and its FLOP ratio, dense against PyTorch",
    "sweep": "a small sweep, twice: overhead, compilation from the cache, waiting for data",
    "demo": "`make demo` from a clean clone, install included (minutes, and a network)",
}


@dataclass(frozen=True)
class Row:
    """One figure; `better` says on which side of `target` it should lie."""

    what: str
    value: float | None
    unit: str
    target: float | None
    better: str = "lower"
    why: str = ""


def run(name: str, *, json: bool = False) -> None:
    """Measures one benchmark, or "all" of them, and prints a table or one JSON object."""
    if name != "all" and name not in BENCHMARKS:
        known = "; ".join(f"{key}: {text}" for key, text in BENCHMARKS.items())
        raise InputError("bench", name, f"unknown; known: all; {known}")
    rows: list[Row] = []
    for key in BENCHMARKS if name == "all" else (name,):
        print(f"modjax: bench {key} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"modjax.bench.{key}").measure()
    _print(rows, as_json=json)


def _print(rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        report = {
            "device": _device(),
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "modjax")},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(report, indent=1))
        return
    width = max(len(row.what) for row in rows)
    for row in rows:
        value = f"not measured: {row.why}" if row.value is None else f"{row.value:8.3f} {row.unit}"
        print(f"{row.what:{width}}  {value:18}  {_verdict(row)}")


def _verdict(row: Row) -> str:
    if row.target is None or row.value is None:
        return ""
    sign = "<=" if row.better == "lower" else ">="
    met = row.value <= row.target if row.better == "lower" else row.value >= row.target
    return f"target {sign} {row.target:g}: {'met' if met else 'MISSED'}"


def _device() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
