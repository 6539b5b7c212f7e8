"""Runs as Jobs of Kubernetes, by kubectl: one Job a run, or one JobSet if several hosts do it.

A pod that a signal stopped exits with 75 once its state is saved. Kubernetes starts it again, as it
does after the loss of its node. Kueue, if there is a queue, admits each run by itself.
"""

import errno
import hashlib
import json
import math
import shlex
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.bucket import url
from modjax.errors import MOST_SAID, InputError, one_line, require
from modjax.files import reason, write_atomically
from modjax.scaling.engines.batch import RUNNING, WAITING, Batch, States
from modjax.scaling.engines.engine import Engine, HandedOver, describe_exit
from modjax.scaling.engines.manifest import LOST, NAME, NUMBER, SWEEP, manifests, pod_of
from modjax.scaling.workers.task import STOPPED
from modjax.scaling.workers.worker import Settings
from modjax.specs import RunSpec
from modjax.specs.fields import NotNegative, Positive, check

SECONDS_TO_ANSWER = 60.0
TPU_SIDES = "must be the sides of a slice, such as 4x4"
OUT_OF_REACH = "kubectl is not on the PATH: --engine.render=FOLDER only writes the manifests"


@dataclass(frozen=True)
class Gke:
    """Jobs of Kubernetes, each for one run.

    jobs: the most at a time; 0 submits all.
    render: a folder for the manifests, which are then not submitted; "" submits them.
    image, python: the container image, which has modjax, and the Python in it.
    namespace, account: of the pods; "" leaves them to kubectl and to Kubernetes.
    queue: Kueue's LocalQueue; "" for none.
    claim, mount: a PersistentVolumeClaim, and the path at which pods and this machine see it.
    pod: a file of YAML with more of a pod's spec, such as volumes; "" for none.
    accelerator, topology: of a TPU slice, such as tpu-v5-lite-podslice and 4x4; "" for none.
    slices: that do a run together. hosts: of each slice, or that do a run together.
    tpus, gpus, cores, memory: of a host; memory in GB. 0 asks for none.
    spot: whether the hosts are spot machines.
    notice: seconds to save its state that a pod has after it was told to stop.
    """

    jobs: NotNegative[int] = 0
    render: str = ""
    image: str = ""
    python: str = "python"
    namespace: str = ""
    account: str = ""
    queue: str = ""
    claim: str = ""
    mount: str = ""
    pod: str = ""
    accelerator: str = ""
    topology: str = ""
    slices: Positive[int] = 1
    hosts: Positive[int] = 1
    tpus: NotNegative[int] = 0
    gpus: NotNegative[int] = 0
    cores: NotNegative[float] = 0.0
    memory: NotNegative[float] = 0.0
    spot: bool = False
    notice: Positive[int] = 120

    @property
    def together(self) -> bool:
        """Says whether several hosts do a run together."""
        return self.slices * self.hosts > 1

    def __post_init__(self):
        check(self, "--engine")
        if self.topology:
            sides, chips = self.topology.split("x"), self.hosts * self.tpus
            require(all(map(str.isdigit, sides)), "--engine.topology", self.topology, TPU_SIDES)
            accepted = f"has not {chips} chips, as --engine.hosts x --engine.tpus"
            fits = math.prod(map(int, sides)) == chips
            require(fits, "--engine.topology", self.topology, accepted)

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
                engine.apply(Path("check"), 1, "--dry-run=server")
            except OSError as error:
                accepted = f"the cluster refuses such a run: {reason(error)}"
                raise InputError("--engine", "gke", accepted) from error
        return engine


class Jobs(Batch):
    """Jobs or JobSets, which are labelled with their folder and number."""

    def __init__(self, options: Gke, settings: Settings, runs: int):
        jobs = 0 if options.render else options.jobs
        super().__init__(settings, runs, jobs, options.together, "")
        self.options, self.pod = options, pod_of(options)
        self.kind = "jobsets.jobset.x-k8s.io" if options.together else "jobs.batch"
        self.sweep = hashlib.sha256(settings.workdir.encode()).hexdigest()[:16]

    def check(self, specs: Sequence[RunSpec]) -> None:
        if self.options.render:
            self.checked, self.looked = True, math.inf  # the cluster may be out of reach
        else:
            super().check(specs)

    def start(self, specs: Sequence[RunSpec]) -> None:
        super().start(specs)
        if self.options.render:
            (folder,), self.tasks = self.unsent, {}
            file = Path(self.options.render) / f"{folder.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, self.manifests(folder, len(specs)))
            raise HandedOver(f"kubectl apply -f {shlex.quote(str(file))}  # does {len(specs)} runs")

    def manifests(self, folder: Path, count: int) -> str:
        return manifests(self.options, self.sweep, self.pod, folder, count)

    def apply(self, folder: Path, count: int, *options: str) -> None:
        self._call("apply", "--filename=-", *options, text=self.manifests(folder, count))

    def submit(self, folder: Path, count: int) -> None:
        self.apply(folder, count)

    def look(self) -> States:
        chosen = f"--selector={SWEEP}={self.sweep}"
        items = json.loads(self._call("get", f"{self.kind},pods", chosen, "--output=json"))["items"]
        pods = defaultdict(list)
        for item in items:
            if item["kind"] == "Pod":
                pods[_task(item)].append(item["status"])
        others = [item for item in items if item["kind"] != "Pod"]
        return {_task(item): state_of(item.get("status", {}), pods[_task(item)]) for item in others}

    def cancel(self, name: str, save: bool) -> None:
        chosen = f"--selector={NAME}={name}"
        # A Job that is deleted in the foreground stays until its pods have gone.
        self._call("delete", self.kind, chosen, "--cascade=foreground", "--wait=false")
        if not save:
            self._call("delete", "pods", chosen, "--grace-period=0", "--force", "--wait=false")

    def _call(self, *arguments: str, text: str = "") -> str:
        """Returns what kubectl prints. Raises OSError with its last line if it fails."""
        where = (f"--namespace={self.options.namespace}",) if self.options.namespace else ()
        try:
            done = subprocess.run(
                ("kubectl", *where, *arguments),
                input=text,
                capture_output=True,
                text=True,
                timeout=SECONDS_TO_ANSWER,
                start_new_session=True,  # Ctrl-C reaches the launcher alone
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(errno.EIO, "kubectl does not answer") from error
        if done.returncode != 0:
            raise OSError(errno.EIO, one_line(done.stderr, MOST_SAID))
        return done.stdout


def _task(item: Mapping[str, Any]) -> tuple[str, int]:
    labels = item["metadata"]["labels"]
    return labels[NAME], int(labels[NUMBER])


def state_of(status: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the state of a Job or a JobSet, and why. pods: the status of each of its pods."""
    conditions = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
    if conditions.keys() & {"Complete", "Completed"}:
        return "died", "ended without a word"
    if "Failed" not in conditions:
        parts = status.get("replicatedJobsStatus", [status])
        return (RUNNING if any(part.get("ready", 0) for part in parts) else WAITING), ""
    ends = [
        container["state"]["terminated"]
        for pod in pods
        for container in pod.get("containerStatuses", ())
        if "terminated" in container["state"]
    ]
    if any(end.get("reason") == "OOMKilled" for end in ends):
        return "out of memory", "more than --engine.memory"
    if any(LOST.items() <= c.items() for pod in pods for c in pod.get("conditions", ())):
        return "node lost", "its pod was evicted"
    codes = [end["exitCode"] for end in ends if end["exitCode"] not in (0, STOPPED)]
    if codes:
        return "died", describe_exit(codes[0] if codes[0] < 128 else 128 - codes[0])
    return "died", one_line(conditions["Failed"].get("message", "failed"), MOST_SAID)
