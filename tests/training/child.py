"""A training process for tests to kill: python -m tests.training.child RUN_DIR DATA_DIR CHANGES.

Prints "step N" for every line of metrics, and takes its time for it.
"""

import json
import sys
import time
from pathlib import Path

import jax

from modjax.specs import Execution
from modjax.training.loop import Preempted, train
from tests.training.tiny import run_spec

SECONDS_PER_LINE = 0.03
EXECUTION = Execution(data=1, log_every=2, checkpoint_seconds=0.05)


def main() -> None:
    run_dir, data_dir, changes = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 1)

    def progress(line):
        print("step", line["step"], flush=True)
        time.sleep(SECONDS_PER_LINE)

    try:
        train(
            run_spec(**json.loads(changes)),
            EXECUTION,
            run_dir=Path(run_dir),
            data_dir=Path(data_dir),
            progress=progress,
        )
    except Preempted:
        sys.exit(75)
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
