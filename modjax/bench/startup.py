"""Start-up: importing modjax and its model against importing jax and flax alone."""

import statistics
import subprocess
import sys
import time

from modjax.bench import Row, fill

ROUNDS = 7
ROWS = (Row("import modjax / import jax and flax", "ratio", 1.2),)
BASE = "import jax, flax.nnx"
OURS = "import modjax; modjax.Transformer, modjax.MoDBlock, modjax.flops"


def measure() -> list[Row]:
    """Returns the median ratio of the two import times. Each import has a fresh process."""
    seconds: dict[str, list[float]] = {BASE: [], OURS: []}
    for _ in range(ROUNDS + 1):  # the first round reads the files from disk
        for code, found in seconds.items():
            start = time.perf_counter()
            # -P: a file in the current folder must not pass for a package.
            subprocess.run([sys.executable, "-P", "-c", code], check=True)
            found.append(time.perf_counter() - start)
    ratio = statistics.median(
        ours / base for ours, base in zip(seconds[OURS][1:], seconds[BASE][1:], strict=True)
    )
    return fill(ROWS, [ratio])
