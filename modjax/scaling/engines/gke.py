"""Runs as Jobs of Kubernetes, by kubectl: one Job a run, or one JobSet if several hosts do it.

A pod that a signal stopped exits with 75 once its state is saved. Kubernetes starts it again, as it
does after the loss of its node. Kueue, if there is a queue, admits each run by itself.
"""

import hashlib
import json
import math
import shlex
import shutil
import signal
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.bucket import url
from modjax.errors import MOST_SAID, InputError, one_line, require
from modjax.files import is_copy, reason, write_atomically
from modjax.scaling.engines.batch import RUNNING, WAITING, Batch, States, Task, call
from modjax.scaling.engines.engine import Engine, HandedOver, describe_exit
from modjax.scaling.engines.manifest import (
    LOST,
    NAME,
    NUMBER,
    SWEEP,
    Pods,
    manifests,
    name_of,
    pod_of,
)
from modjax.scaling.workers.task import STOPPED
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec
from modjax.specs.fields import NotNegative

SECONDS_TO_GO = 30.0  # of a pod, after the time that it has to save its state
MOST_IN_A_CALL = 50  # Jobs that kubectl makes within the time that it has to answer
OUT_OF_REACH = "kubectl is not on the PATH: --engine.render=FOLDER only writes the manifests"


@dataclass(frozen=True)
class Gke(Pods):
    """Jobs of Kubernetes, each for one run. The other fields are those of Pods.

    jobs: the most at a time; 0 submits all.
    render: a folder for the manifests, which are then not submitted; "" submits them.
    """

    jobs: NotNegative[int] = 0
    render: str = ""

    def open(self, settings: Settings, runs: int) -> Engine:
        accepted = "must name a container image that has modjax"
        require(self.image != "", "--engine.image", self.image, accepted)
        for name, path in (("--workdir", settings.workdir), ("--data-dir", settings.data_dir)):
            accepted = f"pods see only --engine.mount = {self.mount!r}"
            seen = not self.claim or url(path) or Path(path).is_relative_to(self.mount)
            require(bool(seen), name, path, accepted)
        engine = Jobs(self, settings, runs)
        if not self.render:
            require(shutil.which("kubectl") is not None, "--engine", "gke", OUT_OF_REACH)
            try:
                engine.submit(Path("check"), [0], "--dry-run=server")
            except OSError as error:
                accepted = f"kubectl cannot submit a run: {reason(error)}"
                raise InputError("--engine", "gke", accepted) from error
        return engine


class Jobs(Batch):
    """Jobs or JobSets, which are labelled with their folder and number."""

    def __init__(self, options: Gke, settings: Settings, runs: int):
        super().__init__(settings, runs, options.jobs, options.together, "")
        self.options, self.pod = options, pod_of(options)
        self.kind = "jobsets.jobset.x-k8s.io" if options.together else "jobs.batch"
        self.sweep = f"w{hashlib.sha256(settings.workdir.encode()).hexdigest()[:15]}"
        self.kubectl = ("kubectl", *[f"--namespace={options.namespace}"][: bool(options.namespace)])
        self.seconds_to_stop = options.notice + SECONDS_TO_GO
        self.runs_there = "--engine.image", options.image

    def check(self, specs: Sequence[RunSpec]) -> None:
        if self.options.render:
            self.checked, self.looked = True, math.inf  # the cluster may be out of reach
        else:
            super().check(specs)

    def room(self) -> int:
        return self.runs if self.options.render else super().room()

    def start(self, specs: Sequence[RunSpec]) -> None:
        super().start(specs)
        if self.options.render:
            (folder,), self.tasks = self.unsent, {}
            file = Path(self.options.render) / f"{folder.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, self.manifests(folder, range(len(specs))))
            raise HandedOver(f"kubectl apply -f {shlex.quote(str(file))}  # does {len(specs)} runs")

    def manifests(self, folder: Path, numbers: Sequence[int]) -> str:
        return manifests(self.options, self.sweep, self.pod, folder, numbers)

    def submit(self, folder: Path, numbers: Sequence[int], *options: str) -> None:
        for i in range(0, len(numbers), MOST_IN_A_CALL):
            text = self.manifests(folder, numbers[i : i + MOST_IN_A_CALL])
            call(*self.kubectl, "create", "--filename=-", *options, text=text)

    def look(self) -> States:
        chosen = f"--selector={SWEEP}={self.sweep}"
        items = call(*self.kubectl, "get", f"{self.kind},pods", chosen, "--output=json")
        items, pods = json.loads(items)["items"], defaultdict(list)
        for item in items:
            if item["kind"] == "Pod":
                pods[_task(item)].append(item["status"])
        others = [item for item in items if item["kind"] != "Pod"]
        return {_task(item): state_of(item.get("status", {}), pods[_task(item)]) for item in others}

    def cancel(self, names: Sequence[str], save: bool) -> None:
        which = (f"--selector={NAME} in ({','.join(names)})", "--wait=false")
        # A Job that is deleted in the foreground stays until its pods have gone.
        call(*self.kubectl, "delete", self.kind, *which, "--cascade=foreground")
        if not save:
            call(*self.kubectl, "delete", "pods", *which, "--grace-period=0", "--force")

    def where_to_read(self, task: Task) -> str:
        if not is_copy(self.home):
            return super().where_to_read(task)
        return f"see {' '.join(self.kubectl)} logs job/{name_of(task.folder, task.number)}"


def _task(item: Mapping[str, Any]) -> tuple[str, int]:
    labels = item["metadata"]["labels"]
    return labels[NAME], int(labels[NUMBER])


def state_of(status: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the state of a Job or a JobSet, and why. pods: the status of each of its pods."""
    conditions = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
    if conditions.keys() & {"Complete", "Completed"}:
        return "died", "ended without a word"
    judged = [pod for pod in pods if not _is_lost(pod)]
    containers = [state["state"] for pod in judged for state in pod.get("containerStatuses", ())]
    if "Failed" not in conditions:
        parts = status.get("replicatedJobsStatus", [status])
        if any(part.get("ready", 0) for part in parts):
            return RUNNING, ""
        waiting = [state["waiting"].get("reason", "") for state in containers if "waiting" in state]
        waiting += [c.get("message", "") for pod in judged for c in pod.get("conditions", ())]
        return WAITING, one_line(next(filter(None, waiting), ""), MOST_SAID)
    ends = [state["terminated"] for state in containers if "terminated" in state]
    if any(end.get("reason") == "OOMKilled" for end in ends):
        return "out of memory", "killed for its memory, see --engine.memory"
    codes = [end["exitCode"] for end in ends if end.get("reason") != "Unknown"]  # of a reboot
    codes = [code for code in codes if code not in (0, STOPPED)]
    if codes:
        code, known = codes[-1], {128 + number for number in signal.Signals}
        return "died", describe_exit(128 - code if code in known else code)
    return "node lost", one_line(conditions["Failed"].get("message", "failed"), MOST_SAID)


def _is_lost(pod: Mapping[str, Any]) -> bool:
    """Returns whether a pod was taken away, after which there is another."""
    return any(LOST.items() <= condition.items() for condition in pod.get("conditions", ()))
