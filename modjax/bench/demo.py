"""`make demo` from a clean clone, install included, with nothing cached from earlier runs."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

from modjax.bench import Row

REPOSITORY = Path(__file__).resolve().parents[2]


def measure() -> list[Row]:
    what = "make demo from a clean clone"
    if not (REPOSITORY / ".git").exists():
        return [Row(what, None, "minutes", 12.0, why="not run from a clone")]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "modjax"
        subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
        environment = os.environ | {
            "XDG_CACHE_HOME": f"{folder}/cache",
            "XDG_DATA_HOME": f"{folder}/data",
        }
        start = time.perf_counter()
        done = subprocess.run(["make", "demo"], cwd=clone, env=environment, capture_output=True)
        minutes = (time.perf_counter() - start) / 60
        if done.returncode != 0:
            why = done.stderr.decode().strip().splitlines()[-1]
            return [Row(what, None, "minutes", 12.0, why=why)]
    return [Row(what, minutes, "minutes", 12.0)]
