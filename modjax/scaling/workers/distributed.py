"""One run that all hosts of a slice or of a job train together, each by its own process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modjax.backend import start
from modjax.bucket import url_of
from modjax.errors import InputError, describe, require
from modjax.files import is_copy
from modjax.records import RunRecord, run_dir
from modjax.scaling.plan.experiment import Experiment
from modjax.scaling.workdir import claim
from modjax.scaling.workers.lease import Guard
from modjax.scaling.workers.run_lock import run
from modjax.specs import RunSpec


def train_together(
    experiment: Experiment, spec: RunSpec, workdir: Path, *, other_code: bool, **data: Any
) -> RunRecord | None:
    """Does this process's part of a run.

    other_code: as `training.loop.train` takes it. data: its data_dir and fingerprint.
    Returns the record in the first process, which locks the run and writes its result; None in
    the others. Raises InputError if no cluster is found or another process trains the run, and
    Preempted after a signal.
    """
    accepted = "must be a folder that all hosts share, no bucket"
    require(not is_copy(workdir), "--workdir", url_of(workdir), accepted)
    first = join() == 0
    from modjax.scaling.workers.job import check, train  # they ask for the devices of the cluster

    def train_in(folder: Path, guard: Guard) -> RunRecord:
        options = {
            "other_code": other_code,
            "guard": guard,
            "progress": _print if first else None,
            **data,
        }
        return train(spec, experiment.execution, run_dir=folder, **options)

    check([spec], experiment.execution, **data)
    if first:
        claim(experiment, workdir, data["fingerprint"])
    done = run_together(spec, workdir, train_in)
    if first and done is None:
        raise InputError("--run", spec.run_id, "another process trains it")
    return done[0] if first and done is not None else None


def join() -> int:
    """Starts jax as one of the processes of a cluster, and returns this one's number.

    Raises InputError if no cluster is found.
    """
    start()
    import jax

    try:
        jax.distributed.initialize()
    except Exception as error:
        accepted = f"no cluster was found, see launch/README.md: {describe(error)}"
        raise InputError("--distributed", True, accepted) from error
    return jax.process_index()


def run_together(
    spec: RunSpec, workdir: Path, train: Callable[[Path, Guard], RunRecord], lease: float = 0.0
) -> tuple[RunRecord, bool] | None:
    """Does what `run_lock.run` does, in all processes of a cluster; the first has the lock.

    Returns None in the other processes if the first does not train.
    """
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    said = False

    def tell(trains: bool) -> bool:
        """Sends the first process's `trains` to all processes."""
        nonlocal said
        said = True
        return bool(broadcast_one_to_all(trains))

    def train_all(folder: Path, guard: Guard) -> RunRecord:
        tell(True)
        return train(folder, guard)

    if jax.process_index() > 0:
        folder = run_dir(workdir, spec.run_id)
        return (train(folder, lambda: None), True) if tell(False) else None
    done = run(spec, workdir, train_all, lease)
    if not said:
        tell(False)
    return done


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.stderr)
