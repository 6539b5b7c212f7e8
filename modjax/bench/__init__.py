"""`modjax bench`: every performance figure of the project, as ratios taken in one run.

Each module declares its rows, `ROWS`, and measures them in `measure()`. A row that could not be
measured has no value and gives the reason. These are not tests: machines differ, and people read
the figures.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.backend import last_line
from modjax.errors import InputError, describe

# name -> what the module of this name measures
BENCHMARKS = {
    "startup": "time to import modjax against jax and flax alone",
    "step": "train step: MoD against dense and its FLOP ratio, dense against PyTorch",
    "decode": "decoding and prefill: MoD against dense, dense against reading its parameters",
    "moe": "mixture of experts and MoDE: train step and decoding against dense, on a TPU slice",
    "altup": "Alternating Updates: train step and decoding against dense, Sequence-AltUp",
    "pretrained": "a pretrained model against transformers: prefill, decoding, memory of loading",
    "skip": "Skip: prefill, decoding and tuning of routers in a model of SmolLM2's shape",
    "sweep": "a small sweep, twice: overhead, compilation from the cache, waiting for data",
    "demo": "`make demo` from a clean clone, install included (minutes, and a network)",
}


@dataclass(frozen=True)
class Row:
    """One figure.

    better: "lower" or "higher", the side of `target` on which the value should lie.
    why: the reason why there is no value.
    """

    what: str
    unit: str
    target: float | None
    better: str = "lower"
    value: float | None = None
    why: str = ""


def fill(rows: Sequence[Row], values: Sequence[float]) -> list[Row]:
    """Returns the declared rows with `values` filled in."""
    return [dataclasses.replace(r, value=v) for r, v in zip(rows, values, strict=True)]


def run(name: str, *, json: bool = False) -> None:
    """Measures one benchmark, or "all" of them, and prints a table or one JSON object."""
    if name != "all" and name not in BENCHMARKS:
        known = "; ".join(f"{key}: {text}" for key, text in BENCHMARKS.items())
        raise InputError("bench", name, f"unknown; known: all; {known}")
    names = list(BENCHMARKS) if name == "all" else [name]
    modules = {key: importlib.import_module(f"modjax.bench.{key}") for key in names}
    rows: list[Row] = []
    for key, module in modules.items():
        progress(f"bench {key} ...")
        rows += _measure(module)
    _print(rows, as_json=json)


def _measure(module: Any) -> list[Row]:
    """Returns the module's rows. An error leaves them without values; other modules still run."""
    try:
        return module.measure()
    except Exception as error:
        return [dataclasses.replace(row, why=describe(error)) for row in module.ROWS]


def progress(text: str) -> None:
    print(f"modjax: {text}", file=sys.stderr, flush=True)


def fresh_environment(folder: Path) -> dict[str, str]:
    """Returns the user's environment, but with modjax's data and caches in `folder`."""
    moved = ("MODJAX_DATA", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in moved}
    return kept | {f"XDG_{kind}_HOME": str(folder / kind) for kind in ("CACHE", "DATA", "STATE")}


def call(command: Sequence[str], environment: dict[str, str], cwd: Path | None = None) -> None:
    """Runs a command without showing its output. Raises RuntimeError with its last line."""
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True)
    if done.returncode != 0:
        last = last_line(done.stderr.decode(errors="replace"))
        raise RuntimeError(f"{' '.join(command[:5])} ended with {done.returncode}: {last}")


def _print(rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        report = {
            "device": _device(),
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "modjax")},
            "rows": [_plain(row) for row in rows],
        }
        print(json.dumps(report, indent=1))
        return
    width = max(len(row.what) for row in rows)
    for row in rows:
        value = f"not measured: {row.why}" if row.value is None else f"{row.value:8.3f} {row.unit}"
        print(f"{row.what:{width}}  {value:18}  {_verdict(row)}".rstrip())


def _plain(row: Row) -> dict[str, Any]:
    names = ["what", "value", "unit", "target", "better"] + ["why"] * (row.value is None)
    return {name: getattr(row, name) for name in names}


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
