"""A small sweep, run twice: what it spends outside training and compilation, and on waiting."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modjax.bench import Row
from modjax.records import Record, read_records

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"
JOBS = 2


def measure() -> list[Row]:
    if not CONFIG.exists():
        return [_missing(f"{CONFIG.name} is not beside the package: run from a clone")]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(base / "xla")}
        first, first_wall = _sweep(base / "first", environment)
        # The second finds the programs compiled, but none of the results.
        second, _ = _sweep(base / "second", environment)
    spent = sum(r.train_seconds + r.compile_seconds for r in first)
    compiled = sum(r.compile_seconds for r in second) / sum(r.compile_seconds for r in first)
    waited = sum(r.data_wait_seconds for r in first) / sum(r.train_seconds for r in first)
    overhead = 1 - spent / (JOBS * first_wall)
    return [
        Row("sweep wall time outside training and compilation", overhead, "share", 0.15),
        Row("compilation in a repeated sweep / in the first", compiled, "ratio", 0.2),
        Row("train steps waiting for data", waited, "share of step time", 0.01),
    ]


def _sweep(workdir: Path, environment: dict[str, str]) -> tuple[list[Record], float]:
    command = [sys.executable, "-m", "modjax.cli", "sweep", f"--config={CONFIG}",
               f"--workdir={workdir}", "--jobs", str(JOBS)]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"the sweep failed: {done.stderr.strip().splitlines()[-1:]}")
    return read_records(workdir), wall


def _missing(why: str) -> Row:
    return Row("sweep", None, "", None, why=why)
