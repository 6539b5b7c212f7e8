"""One run that all hosts of a slice train together, each by its own process."""

import json
import sys
from pathlib import Path
from typing import Any

from modjax.backend import start
from modjax.errors import InputError, describe
from modjax.records import RunRecord, run_dir
from modjax.scaling.engines.run_lock import run
from modjax.scaling.plan.experiment import Experiment
from modjax.scaling.workdir import claim
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
    start()
    import jax

    try:
        jax.distributed.initialize()
    except Exception as error:
        accepted = f"no cluster was found, see launch/README.md: {describe(error)}"
        raise InputError("--distributed", True, accepted) from error
    from modjax.scaling.engines.job import check, train  # they ask for the devices of the cluster

    def train_in(folder: Path, **options: Any) -> RunRecord:
        options |= {"other_code": other_code, **data}
        return train(spec, experiment.execution, run_dir=folder, **options)

    check([spec], experiment.execution, **data)
    if jax.process_index() > 0:
        train_in(run_dir(workdir, spec.run_id))
        return None
    claim(experiment, workdir, data["fingerprint"])
    done = run(spec, workdir, lambda folder: train_in(folder, progress=_print))
    if done is None:
        raise InputError("--run", spec.run_id, "another process trains it")
    return done[0]


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.stderr)
