"""Folder of a sweep: its plan, and the log of its sessions.

workdir/plan.json               the config, the command and the runs of the sweep
workdir/sweep.json              the time that every session of the sweep spent
workdir/runs/<run_id>/          lock, spec.json, provenance.json, log.txt, metrics.jsonl,
                                checkpoints/, and at the end result.json; failure.json if the run
                                was given up
"""

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.bucket import Conflict, get
from modjax.errors import InputError, require
from modjax.files import Missing, lock, read_json
from modjax.records import WRITTEN_AGAIN, read_as, require_format, run_dir, write_json, write_spec
from modjax.scaling.plan.experiment import Experiment
from modjax.specs import from_dict, to_dict
from modjax.specs.run import FORMAT

logger = logging.getLogger("modjax")


@dataclass(frozen=True)
class Plan:
    """Content of plan.json.

    config: the experiment's values as plain data.
    runs: the ids of its runs.
    """

    config_file: str
    command: str
    config: dict[str, Any]
    data_fingerprint: str
    runs: tuple[str, ...]
    format: int = 1


def read_plan(workdir: Path) -> Plan | None:
    """Returns the plan of the sweep in `workdir`, or None if there is no sweep.

    Raises InputError if the plan cannot be read.
    """
    try:
        return read_as(lambda values: from_dict(Plan, values), workdir / "plan.json", WRITTEN_AGAIN)
    except Missing:
        return None


def check_claim(experiment: Experiment, workdir: Path, fingerprint: str) -> Plan | None:
    """Checks that `workdir` can hold the experiment's plan, and returns the plan it has so far.

    A plan may grow, but not shrink or change.

    Raises InputError if `workdir` has runs of another format, runs that are not part of this plan,
    or runs on other data.
    """
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    require(there.is_dir(), "--workdir", str(workdir), f"cannot be made: {there} is a file")
    earlier = read_plan(workdir)
    if earlier is not None:
        require_format(workdir / "plan.json", earlier.format)
        others = set(earlier.runs) - {spec.run_id for spec in experiment.specs}
        another = (
            f"holds another plan ({len(others)} of its runs are not in this one): choose another "
            "folder, or delete this one"
        )
        require(not others, "--workdir", str(workdir), another)
        prepared_anew = (
            "holds runs on other data: the token cache was prepared anew since; choose another "
            "folder, or delete this one"
        )
        same_data = earlier.data_fingerprint == fingerprint
        require(same_data, "--workdir", str(workdir), prepared_anew)
    return earlier


def claim(experiment: Experiment, workdir: Path, fingerprint: str) -> None:
    """Writes plan.json, and spec.json for every run that lacks it.

    plan.json keeps the command that wrote it until the plan grows.
    Raises InputError as `check_claim` does.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # its parent takes no folders, as /proc
        reason = f"cannot be made: {error.strerror}"
        raise InputError("--workdir", str(workdir), reason) from error

    def write_plan() -> None:
        earlier = check_claim(experiment, workdir, fingerprint)
        run_ids, command = tuple(spec.run_id for spec in experiment.specs), experiment.command
        if earlier is not None and len(earlier.runs) == len(run_ids):
            command = earlier.command
        for spec in experiment.specs:
            folder = run_dir(workdir, spec.run_id)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "spec.json").exists():
                write_spec(folder, spec)
        file, config = experiment.config_file, experiment.config
        plan = Plan(file, command, config, fingerprint, run_ids, FORMAT)
        write_json(workdir / "plan.json", to_dict(plan))

    _rewrite(workdir / "plan.json", write_plan)


def log_session(workdir: Path, entry: dict[str, Any]) -> None:
    """Appends a session to sweep.json. Renames a damaged file to sweep.json.damaged."""
    path = workdir / "sweep.json"

    def append() -> None:
        earlier = []
        try:
            earlier = read_json(path, "")
            require(isinstance(earlier, list), str(path), "damaged", "must be a list")
        except Missing:
            pass
        except InputError:
            path.rename(path.with_name("sweep.json.damaged"))
            logger.warning("modjax: %s is damaged: kept as %s.damaged", path, path.name)
            earlier = []
        write_json(path, [*earlier, entry])

    _rewrite(path, append)


def _rewrite(path: Path, change: Callable[[], None]) -> None:
    """Calls `change`, which reads and writes a file, until no other process does so meanwhile."""
    with lock(path.parent / "plan.lock", patience=math.inf):
        while True:
            get(path.parent, [path.name])
            with contextlib.suppress(Conflict):
                return change()
