"""Compiles the train steps of the record for described TPUs, and keeps what the compiler says.

Usage: python -m experiments.tpu_compile.run [CELL ...]
A cell that is kept already is left out, unless it is named. Each takes one or two minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

from experiments.tpu_compile.config import ARMS

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
QKVC = "queries,keys,values,context"
TOPOLOGY = "v5e:4x4"
# Cell -> (fsdp, remat): what was estimated as fastest of the meshes and remats tried.
CELLS = {
    **{f"{arm}-220M": (16, "context") for arm in ARMS},
    "dense-1B": (16, QKVC),
    "mod12-1B": (16, QKVC),
    "dense-3B": (16, "context"),
    "mod12-3B": (16, "context"),
}
LEFT_OUT = ("inputs", "temporaries", "unknown")


def compiled(cell: str) -> dict:
    """Returns the report on a cell's train step, see `modjax aot --json`."""
    fsdp, remat = CELLS[cell]
    command = [sys.executable, "-m", "modjax.cli", "aot", "--json", f"--topology={TOPOLOGY}"]
    command += [f"--config={HERE / 'config.py'}:{cell}"]
    command += [f"--config.execution.fsdp={fsdp}", f"--config.execution.remat={remat}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {name: value for name, value in json.loads(done.stdout).items() if name not in LEFT_OUT}


def main(cells: list[str]) -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for cell in cells or [cell for cell in CELLS if cell not in kept]:
        kept[cell] = compiled(cell)
        kept = {name: kept[name] for name in CELLS if name in kept}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
