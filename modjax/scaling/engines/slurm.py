"""Runs as tasks of Slurm: one job array a submission, by sbatch. Needs no accounting database.

submitit would pickle functions and results, which files of text make needless. Its handling of
SIGUSR2 would bypass the SIGTERM that training saves its state at, and it takes each preemption of
a job of at most ten minutes for the end of its time.
"""

import getpass
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modjax.bucket import url_of
from modjax.errors import InputError, require
from modjax.files import reason
from modjax.scaling.engines.batch import RUNNING, WAITING, Batch, States, call
from modjax.scaling.engines.engine import Engine, describe_exit
from modjax.scaling.workers.task import STOPPED
from modjax.scaling.workers.worker import Settings
from modjax.specs.fields import NotNegative, Positive, check

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol")
ENDS = {
    "NODE_FAIL": "node lost",
    "BOOT_FAIL": "node lost",
    "LAUNCH_FAILED": "node lost",
    "TIMEOUT": "preempted",
    "DEADLINE": "preempted",
    "PREEMPTED": "preempted",
    "REVOKED": "preempted",
    "CANCELLED": "preempted",
    "OUT_OF_MEMORY": "out of memory",
    "FAILED": "died",
    "COMPLETED": "died",  # without an end file
}
SCRIPT = """#!/bin/bash
trap '' USR2 TERM  # until Python listens, there is nothing to save
exec {launch}{python} -P -m modjax.scaling.workers.task {folder} $SLURM_ARRAY_TASK_ID
"""
AGAIN = "scontrol requeue ${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"


@dataclass(frozen=True)
class Slurm:
    """Tasks of Slurm, each for one run.

    jobs: the most at a time; 0 submits all, as Slurm will have it.
    partition, account, time, constraint: as sbatch takes them; "" leaves them to Slurm.
    hosts: that do a run together, with one process each, or one for each GPU.
    cores, memory, gpus: cores of a process; GB and GPUs of a host. 0 leaves memory to Slurm.
    notice: seconds before the end of `time` at which a run saves its state and is queued again.
    more: further options of sbatch, as in "--qos=low --exclude=n7".
    """

    jobs: NotNegative[int] = 0
    partition: str = ""
    account: str = ""
    time: str = ""
    constraint: str = ""
    hosts: Positive[int] = 1
    cores: Positive[int] = 1
    memory: NotNegative[float] = 0.0
    gpus: NotNegative[int] = 0
    notice: Positive[int] = 120
    more: str = ""

    def __post_init__(self):
        check(self, "--engine")

    def open(self, settings: Settings, runs: int) -> Engine:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        accepted = f"not on the PATH: {', '.join(missing)}; give the command on a login node"
        require(not missing, "--engine", "slurm", accepted)
        try:
            call("sbatch", "--test-only", *self.options(), text="#!/bin/sh\n")
        except OSError as error:
            field, value, said = "--engine", " ".join(self.options()), reason(error)
            if "partition" in said:
                field, value = "--engine.partition", self.partition
            raise InputError(field, value, f"Slurm refuses it: {said}") from error
        return SlurmBatch(self, settings, runs)

    def options(self) -> list[str]:
        """Returns the options of sbatch. Raises InputError for bad ones in `more`."""
        per_host = max(1, self.gpus) if self.hosts > 1 else 1
        named = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "constraint": self.constraint,
            "nodes": self.hosts,
            "ntasks-per-node": per_host,
            "cpus-per-task": self.cores,
            "mem": f"{self.memory * 1024:.0f}M" if self.memory else "",
            "gpus-per-node": self.gpus,
            "signal": f"{'' if self.hosts > 1 else 'B:'}USR2@{self.notice}",
        }
        try:
            more = shlex.split(self.more)
        except ValueError as error:
            raise InputError("--engine.more", self.more, f"must be options: {error}") from error
        return [f"--{name}={value}" for name, value in named.items() if value] + more


class SlurmBatch(Batch):
    """Job arrays of Slurm, each named by its folder."""

    def __init__(self, options: Slurm, settings: Settings, runs: int):
        super().__init__(settings, runs, options.jobs, options.hosts > 1, AGAIN)
        self.options = options

    def submit(self, folder: Path, numbers: Sequence[int]) -> None:
        launch = f"srun --kill-on-bad-exit=1 --cpus-per-task={self.options.cores} "
        script = SCRIPT.format(
            launch=launch if self.together else "",
            python=shlex.quote(sys.executable),
            folder=shlex.quote(url_of(folder) or str(folder)),
        )
        log = str(folder).replace("\\", "\\\\").replace("%", "%%") + "/%a.log"
        fixed = ("--requeue", "--export=ALL", "--open-mode=append", f"--output={log}")
        whole = list(numbers) == list(range(len(numbers)))
        array = f"0-{len(numbers) - 1}" if whole else ",".join(map(str, numbers))
        name = (f"--job-name={folder.name}", f"--array={array}")
        call("sbatch", *self.options.options(), *fixed, *name, text=script)

    def look(self) -> States:
        fields = "--Format=state:|,arraytaskid:|,exit_code:|,reason:|,name:|"
        all_of_me = (f"--user={getpass.getuser()}", "--states=all", "--array", "--noheader")
        states = {}
        for line in call("squeue", *all_of_me, fields).splitlines():
            state, number, status, why, name = line.rstrip().removesuffix("|").split("|", 4)
            if number.isdigit():
                waits = state == "PENDING" or state.startswith("REQUEUE")
                kind = ENDS.get(state, WAITING if waits else RUNNING)
                if state == "FAILED" and os.WEXITSTATUS(int(status)) == STOPPED:
                    kind = "preempted"
                states[name, int(number)] = kind, _explain(state, why, int(status))
        return states

    def cancel(self, names: Sequence[str], save: bool) -> None:
        to = () if self.together else ("--batch",)  # else to the steps
        running = ("--state=RUNNING", "--signal=USR2", *to)
        for name in names:
            for which in [("--state=PENDING",), running] if save else [()]:
                with suppress(OSError):
                    call("scancel", f"--name={name}", *which)


def _explain(state: str, why: str, status: int) -> str:
    """Returns one line about a task. status: as of os.wait."""
    if state == "FAILED":
        with suppress(ValueError):  # Slurm uses numbers of no signal, too
            return describe_exit(os.waitstatus_to_exitcode(status))
    return f"{state} in Slurm ({why})"
