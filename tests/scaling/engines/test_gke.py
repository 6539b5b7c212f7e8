"""Manifests against the schemas of Kubernetes, and sweeps through a stand-in for kubectl."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from modjax.errors import InputError
from modjax.scaling.engines import batch
from modjax.scaling.engines.engine import HandedOver, options_of
from modjax.scaling.engines.gke import Gke, Jobs, state_of
from modjax.scaling.plan.experiment import load
from tests.scaling.engines.test_slurm_stand_in import settings_of
from tests.scaling.small_sweep import (
    CONFIG,
    SMALL,
    assert_one_result_per_run,
    lines,
    run,
    run_ids,
    wait_until,
)

STAND_IN = Path(__file__).with_name("kubectl_stand_in.py")
SLICE: Mapping[str, Any] = MappingProxyType(
    {"accelerator": "tpu-v5-lite-podslice", "topology": "4x4", "hosts": 4, "tpus": 4}
)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """Returns the folder of the stand-in, which is on the PATH."""
    programs, home = tmp_path / "programs", tmp_path / "the cluster"
    programs.mkdir()
    home.mkdir()
    (programs / "kubectl").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (programs / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("KUBECTL_STAND_IN", str(home))
    monkeypatch.setattr(batch, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(batch, "SECONDS_OF_LAG", 0.3)
    return home


def gke_sweep(folders, **texts: str):
    options: Any = options_of("gke", {"image": "modjax:1", "python": sys.executable, **texts})
    return run(folders, load(str(CONFIG), SMALL), options)


def rendered(folders, **options: Any) -> list:
    engine = Jobs(Gke(image="modjax:1", **options), settings_of(folders), 6)
    return list(yaml.safe_load_all(engine.manifests(Path("/mnt/w/tasks/20261130-01-ab"), [0, 1])))


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queue": "team", "claim": "files", "mount": "/mnt", "namespace": "ns", "account": "me"},
        {"cores": 2.5, "memory": 1.5, "gpus": 1, "spot": True},
        {"accelerator": "tpu-v5-lite-podslice", "topology": "2x4", "tpus": 8},
        dict(SLICE),
        {**SLICE, "slices": 2, "queue": "team", "spot": True},
    ],
)
def test_kubernetes_accepts_the_manifests(folders, options, version):
    for number, found in enumerate(rendered(folders, **options)):
        job, spec = found, found["spec"]
        if found["kind"] == "JobSet":  # its schema is not part of Kubernetes; that of its Jobs is
            (part,) = spec["replicatedJobs"]
            assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            assert part["replicas"] == options.get("slices", 1)
            spec = part["template"]["spec"]
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(job, version, strict=True)
        assert found["metadata"]["name"] == f"modjax-20261130-01-ab-{number}"
        assert found["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == options.get("queue")
        assert spec["completions"] == spec["parallelism"] == options.get("hosts", 1)


def test_a_slice_asks_for_its_topology_and_starts_again_as_a_whole(folders):
    (found, _) = rendered(folders, **SLICE, slices=2, spot=True, notice=300)
    policy, (part,) = found["spec"]["failurePolicy"], found["spec"]["replicatedJobs"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] == 0, "a crash is an attempt of the run, which modjax counts"
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = part["template"]["spec"]
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["FailJob"] * 2
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["terminationGracePeriodSeconds"] == 300


def test_a_file_adds_to_the_pod(folders, tmp_path):
    mount = {"name": "bucket", "mountPath": "/bucket"}
    bucket = {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io"}}
    own = {"containers": [{"volumeMounts": [mount]}, {"name": "other"}], "volumes": [bucket]}
    own["containers"][0]["resources"] = {"limits": {"ephemeral-storage": "9Gi"}}
    metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}, "labels": {"team": "a"}}
    template = {"spec": own | {"hostNetwork": True, "tolerations": None}, "metadata": metadata}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(template))
    more = {"pod": str(tmp_path / "pod.yaml"), "claim": "files", "mount": "/mnt", "cores": 2}
    (found, _) = rendered(folders, **more)
    pod, about = (found["spec"]["template"][name] for name in ("spec", "metadata"))
    assert about["annotations"] == metadata["annotations"]
    assert about["labels"] == {"team": "a"} | found["metadata"]["labels"]
    claimed = {"name": "files", "persistentVolumeClaim": {"claimName": "files"}}
    assert pod["volumes"] == [bucket, claimed] and pod["hostNetwork"] is True
    ours, other = pod["containers"]
    assert ours["volumeMounts"] == [mount, {"name": "files", "mountPath": "/mnt"}]
    assert ours["resources"]["limits"] == {"ephemeral-storage": "9Gi", "cpu": "2"}
    assert ours["image"] == "modjax:1" and other == {"name": "other"}


def test_a_task_in_a_bucket_is_named_by_its_url(folders):
    settings = dataclasses.replace(settings_of(folders), workdir="gs://bucket/w")
    engine = Jobs(Gke(image="modjax:1"), settings, 6)
    (found,) = yaml.safe_load_all(engine.manifests(engine.home / "name", [0]))
    (container,) = found["spec"]["template"]["spec"]["containers"]
    task = "exec python -P -m modjax.scaling.workers.task gs://bucket/w/tasks/name 0"
    assert container["command"] == ["/bin/sh", "-c", task]


def test_a_sweep_does_each_run_once(folders, cluster):
    crash, refused, *_ = run_ids()
    (folders[1] / "crash").write_text(crash)
    (folders[1] / "boom").write_text(refused)
    outcome = gke_sweep(folders, namespace="ns", queue="team")
    assert outcome.failures == {crash: "killed by SIGKILL", refused: "ValueError: boom and more"}
    starts, finishes = (lines(folders, name) for name in ("starts", "finishes"))
    assert [len(starts[run_id]) for run_id in run_ids()] == [2, 2, 1, 1, 1, 1]
    assert [len(finishes[run_id]) for run_id in run_ids()] == [0, 0, 1, 1, 1, 1]
    called = (cluster / "called").read_text().splitlines()
    assert called[0].endswith("--dry-run=server") and "--namespace=ns" in called[0]


def test_kubernetes_starts_a_stopped_run_again_and_ctrl_c_cancels_the_others(folders, cluster):
    (folders[1] / "seconds").write_text("60")
    options = Gke(image="modjax:1", python=sys.executable)
    specs, engine = load(str(CONFIG), SMALL).specs[:2], options.open(settings_of(folders), 6)
    for spec in specs:
        (folders[0] / "runs" / spec.run_id).mkdir(parents=True)
    engine.start(specs)
    assert list(engine.events(0)) == []
    wait_until(lambda: sum(map(len, lines(folders, "starts").values())) == 2, 60)
    (pid,) = lines(folders, "starts")[specs[0].run_id]
    os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: len(lines(folders, "starts")[specs[0].run_id]) == 2, 60)
    next_launcher = options.open(settings_of(folders), 6)
    next_launcher.check(specs)
    assert [event.kind for event in next_launcher.events(0)] == ["checked"]
    next_launcher.start(specs)
    assert engine.stop([signal.SIGTERM])
    assert list(cluster.glob("modjax-*")) == []
    ends = [json.loads(path.read_text())["kind"] for path in folders[0].glob("tasks/*/[0-9].json")]
    assert ends == ["preempted"] * 2
    wait_until(lambda: list(next_launcher.events(0.1)) != [], 20)


def test_rendered_manifests_do_the_runs_when_they_are_applied(folders, cluster, tmp_path):
    with pytest.raises(HandedOver, match=f"^kubectl apply -f {tmp_path}/out/.*  # does 6 runs"):
        gke_sweep(folders, render=str(tmp_path / "out"), jobs="2")
    (file,) = (tmp_path / "out").iterdir()
    assert not (cluster / "called").exists() and (folders[0] / "plan.json").exists()
    os.system(f"kubectl create --filename={file}")
    assert gke_sweep(folders).failures == {}
    assert_one_result_per_run(folders)


FAILED = {"type": "Failed", "status": "True", "message": "Job has reached its limit"}
UNPLACED = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
UNPULLED = {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
LOST = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}


def pod(code: int, reason: str = "Error", conditions=()) -> dict:
    end = {"terminated": {"exitCode": code, "reason": reason}}
    return {"conditions": list(conditions), "containerStatuses": [{"state": end}]}


@pytest.mark.parametrize(
    ("status", "pods", "state"),
    [
        ({}, [], ("waiting", "")),
        ({"active": 1, "ready": 0}, [], ("waiting", "")),
        ({"active": 1, "ready": 1}, [pod(75)], ("running", "")),
        ({"replicatedJobsStatus": [{"name": "slice", "ready": 0}]}, [], ("waiting", "")),
        ({"replicatedJobsStatus": [{"name": "slice", "ready": 2}]}, [], ("running", "")),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, [], ("died", "ended without")),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, [], ("died", "ended without")),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, [], ("waiting", "")),
        ({"active": 1}, [UNPULLED], ("waiting", "ImagePullBackOff")),
        ({"active": 1}, [{"conditions": [UNPLACED]}], ("waiting", "0/3 nodes are available")),
        ({"conditions": [FAILED]}, [], ("node lost", "Job has reached its limit")),
        ({"conditions": [FAILED]}, [{"reason": "OutOfcpu"}], ("node lost", "Job has reached")),
        ({"conditions": [FAILED]}, [pod(255, "Unknown")], ("node lost", "Job has reached")),
        ({"conditions": [FAILED]}, [pod(255)], ("died", "exit status 255")),
        ({"conditions": [FAILED]}, [pod(128, "StartError")], ("died", "exit status 128")),
        ({"conditions": [FAILED]}, [pod(75), pod(137)], ("died", "killed by SIGKILL")),
        ({"conditions": [FAILED]}, [pod(1)], ("died", "exit status 1")),
        (
            {"conditions": [FAILED]},
            [pod(1), pod(137, "OOMKilled")],
            ("out of memory", "killed for"),
        ),
        (
            {"conditions": [FAILED]},
            [pod(137, "Error", [LOST]), pod(139)],
            ("died", "killed by SIGS"),
        ),
    ],
)
def test_states_of_jobs_and_jobsets(status, pods, state):
    kind, why = state_of(status, pods)
    assert kind == state[0] and why.startswith(state[1]) and bool(why) == bool(state[1])


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"image": ""}, "^--engine.image = '': must name a container image"),
        ({"topology": "4x", "tpus": "4"}, "^--engine.topology = '4x': must be the sides of a sli"),
        ({"topology": "4x4", "tpus": "4"}, "^--engine.topology = '4x4': has not 4 chips"),
        (
            {"claim": "c", "mount": "/mnt"},
            "^--workdir = '/.*': pods see only --engine.mount =",
        ),
        ({"pod": "/nowhere"}, "^/nowhere = 'damaged or missing': write more of a pod's template"),
        ({"slices": "2", "gpus": "8"}, "^--engine.slices = 2: takes TPUs: hosts with GPUs are one"),
        ({}, "^--engine = 'gke': kubectl cannot submit a run: error: no matches for kind"),
    ],
)
def test_bad_options_are_refused_before_anything_is_submitted(folders, cluster, texts, reason):
    (cluster / "refuse").write_text('error: no matches for kind "JobSet"\n')
    with pytest.raises(InputError, match=reason):
        gke_sweep(folders, **texts)
    assert not folders[0].exists()


def test_without_kubectl_one_line_names_render(folders, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"^--engine = 'gke': kubectl is not on the PATH: --engin"):
        gke_sweep(folders)
