"""A training process for tests to kill: python -m tests.training.child RUN_DIR DATA_DIR CHANGES.

RUN_DIR may be the URL of a workdir in a bucket. The process then takes a lease on the run.
Prints "step N" for every line of metrics, and takes its time for it.
"""

import json
import sys
import time
from pathlib import Path

import jax

from modjax.bucket import local, url
from modjax.scaling.workers.run_lock import run
from modjax.specs import Execution
from modjax.training.loop import Preempted, train
from tests.training.tiny import run_spec

SECONDS_PER_LINE, LEASE = 0.03, 2.0
EXECUTION = Execution(data=1, log_every=2, checkpoint_seconds=0.05)


def main() -> None:
    run_dir, data_dir, changes = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 1)

    def progress(line):
        print("step", line["step"], flush=True)
        time.sleep(SECONDS_PER_LINE)

    spec = run_spec(**json.loads(changes))

    def train_in(folder: Path, guard=lambda: None):
        where = {"run_dir": folder, "data_dir": Path(data_dir)}
        return train(spec, EXECUTION, **where, progress=progress, guard=guard)

    try:
        if url(run_dir):
            assert run(spec, local(run_dir), train_in, LEASE) is not None
        else:
            train_in(Path(run_dir))
    except Preempted:
        sys.exit(75)
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
