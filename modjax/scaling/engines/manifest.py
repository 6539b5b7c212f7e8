"""Manifests of Kubernetes for the runs of a sweep: a Job, or a JobSet if several hosts do a run."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modjax.bucket import url_of
from modjax.errors import require
from modjax.files import damaged, read
from modjax.scaling.workers.task import STOPPED
from modjax.specs.fields import NotNegative, Positive, check

# Labels of an object: the sweep's folder, one submission's name, and the number of its task.
SWEEP, NAME, NUMBER = (f"modjax/{label}" for label in ("sweep", "tasks", "number"))
SECONDS_KEPT = 600  # that Kubernetes remembers a finished run
GKE = "cloud.google.com/gke-"
LOST = {"type": "DisruptionTarget", "status": "True"}  # of a pod that is taken away, or its node
REMEDY = "write more of a pod's template there"
TPU_SIDES = "must be the sides of a slice, such as 4x4"


@dataclass(frozen=True)
class Pods:
    """Options of the pods that do runs.

    image, python: the container image, which has modjax, and the Python in it.
    namespace, account: of the pods; "" leaves them to kubectl and to Kubernetes.
    queue: Kueue's LocalQueue; "" for none.
    claim, mount: a PersistentVolumeClaim, and the path at which pods and this machine see it.
    pod: a file of YAML with more of a pod's template, such as volumes; "" for none.
    accelerator, topology: of a TPU slice, such as tpu-v5-lite-podslice and 4x4; "" for none.
    slices: TPU slices that do a run together.
    hosts: machines of a slice, or of a run where there are no slices.
    tpus, gpus, cores, memory: of a host; memory in GB. 0 asks for none: give the memory of a host
      that others use, too, where a pod without is the first to be evicted.
    spot: whether the hosts are spot machines.
    notice: seconds to save its state that a pod has after it was told to stop.
    """

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
        accepted = "takes TPUs: hosts with GPUs are one slice"
        require(self.slices == 1 or self.tpus > 0, "--engine.slices", self.slices, accepted)
        if self.topology:
            sides, chips = self.topology.split("x"), self.hosts * self.tpus
            require(all(map(str.isdigit, sides)), "--engine.topology", self.topology, TPU_SIDES)
            accepted = f"has not {chips} chips, as --engine.hosts x --engine.tpus"
            fits = math.prod(map(int, sides)) == chips
            require(fits, "--engine.topology", self.topology, accepted)


def name_of(folder: Path, number: int) -> str:
    return f"modjax-{folder.name}-{number}"


def manifests(
    options: Pods, sweep: str, pod: dict[str, Any], folder: Path, numbers: Sequence[int]
) -> str:
    """Returns the manifests of tasks of a folder, as YAML.

    sweep: label of the sweep. pod: from `pod_of`.
    """
    each = [_manifest(options, sweep, pod, folder, number) for number in numbers]
    return yaml.safe_dump_all(each, sort_keys=False)


def _manifest(
    options: Pods, sweep: str, pod: dict[str, Any], folder: Path, number: int
) -> dict[str, Any]:
    """Returns the Job, or the JobSet, of a task."""
    labels = {SWEEP: sweep, NAME: folder.name, NUMBER: str(number)}
    module = f"{shlex.quote(options.python)} -P -m modjax.scaling.workers.task"
    at = url_of(folder)
    log = "" if at else f" >> {shlex.quote(str(folder))}/{number}.log 2>&1"
    task = f"exec {module} {shlex.quote(at or str(folder))} {number}{log}"
    container, *others = pod["spec"]["containers"]
    container = container | {"command": ["/bin/sh", "-c", task]}
    about = {**pod["metadata"], "labels": pod["metadata"].get("labels", {}) | labels}
    template = {"metadata": about, "spec": pod["spec"] | {"containers": [container, *others]}}
    # All hosts of a run stop together, and JobSet starts all of them again.
    action = "FailJob" if options.together else "Ignore"
    job = {
        "completions": options.hosts,
        "parallelism": options.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": action, "onPodConditions": [LOST]},
                {"action": action, "onExitCodes": {"operator": "In", "values": [STOPPED]}},
            ]
        },
        "template": template,
    }
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    about: dict[str, Any] = {"name": name_of(folder, number), "labels": labels | queue}
    if options.namespace:
        about["namespace"] = options.namespace
    if not options.together:
        spec = job | {"ttlSecondsAfterFinished": SECONDS_KEPT}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": spec}
    if options.topology:
        about["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": f"{GKE}nodepool"}
    again = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    template = {"metadata": {"labels": labels}, "spec": job}
    spec = {
        "ttlSecondsAfterFinished": SECONDS_KEPT,
        "failurePolicy": {"maxRestarts": 0, "rules": [again]},
        "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": template}],
    }
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return kind | {"metadata": about, "spec": spec}


def pod_of(options: Pods) -> dict[str, Any]:
    """Returns a pod's template, without its command. Raises InputError for a bad `pod` file."""
    file: Any = {}
    if options.pod:
        try:
            file = yaml.safe_load(read(Path(options.pod), REMEDY))
        except yaml.YAMLError as error:
            raise damaged(Path(options.pod), REMEDY, error) from error
        accepted = "must hold a pod's template, with `spec`, `metadata` or both"
        fits = isinstance(file, dict) and file.keys() <= {"spec", "metadata"}
        require(fits, "--engine.pod", options.pod, accepted)
    own = {name: value for name, value in (file.get("spec") or {}).items() if value is not None}
    container, *others = own.get("containers") or [{}]
    theirs = container.get("resources", {})
    asked = {
        "google.com/tpu": options.tpus,
        "nvidia.com/gpu": options.gpus,
        "cpu": f"{options.cores:g}" if options.cores else 0,
        "memory": f"{options.memory:g}G" if options.memory else 0,
    }
    resources = {name: value for name, value in asked.items() if value}
    chosen = {
        f"{GKE}tpu-accelerator": options.accelerator,
        f"{GKE}tpu-topology": options.topology,
        f"{GKE}spot": "true" if options.spot else "",
    }
    nodes = {name: value for name, value in chosen.items() if value}
    mounts, volumes, tolerations = [], [], []
    if options.claim:
        mounts = [{"name": "files", "mountPath": options.mount}]
        volumes = [{"name": "files", "persistentVolumeClaim": {"claimName": options.claim}}]
    if options.spot:
        tolerations = [{"key": f"{GKE}spot", "operator": "Equal", "value": "true"}]
    more = {
        "name": "modjax",
        "image": options.image,
        "resources": {kind: theirs.get(kind, {}) | resources for kind in ("requests", "limits")},
        "volumeMounts": [*container.get("volumeMounts", ()), *mounts],
    }
    about = {"serviceAccountName": options.account} if options.account else {}
    about |= {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.notice,
        "nodeSelector": own.get("nodeSelector", {}) | nodes,
        "tolerations": [*own.get("tolerations", ()), *tolerations],
        "volumes": [*own.get("volumes", ()), *volumes],
        "containers": [container | more, *others],
    }
    return {"metadata": file.get("metadata") or {}, "spec": own | about}
