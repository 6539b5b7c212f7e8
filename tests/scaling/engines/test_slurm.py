"""Sweeps on a real Slurm cluster of this machine. Training is a stand-in."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.scaling import sweep as sweeps
from modjax.scaling.engines.engine import options_of
from modjax.scaling.plan.experiment import load
from tests.scaling.engines.slurm_cluster import Cluster, wait_for
from tests.scaling.small_sweep import CONFIG, SMALL, assert_one_result_per_run, lines, run, run_ids

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(shutil.which("sbatch") is None or os.geteuid() != 0, reason="needs Slurm"),
]
GRID = ("sweep.sizes=3", "sweep.budgets=5e11", "sweep.seeds=0,1,2,3,4")  # 30 runs
SINGLE = CONFIG.with_name("single.py")
TINY = [
    "data.name=tiny",
    "model.d_model=32",
    "model.d_ff=64",
    "train.batch_size=8",
    "train.seq_len=64",
    "train.steps=20",
    "train.warmup_steps=2",
    "train.eval_sequences=8",
    "execution.log_every=1",
]
DRIVER = """
import json, sys
from pathlib import Path
from modjax.scaling import sweep
from modjax.scaling.engines.engine import options_of
from modjax.scaling.plan.experiment import load
from modjax.scaling.session import Stopped
sweep.JOB = "stand_in"
config, workdir, data_dir, options = sys.argv[1:5]
try:
    outcome = sweep.sweep(load(config, sys.argv[5:]), workdir=Path(workdir),
                          data_dir=Path(data_dir), data_fingerprint="f",
                          engine=options_of("slurm", json.loads(options)))
except Stopped as stopped:
    sys.exit(f"{stopped.saved=}")
print(len(outcome.records), len(outcome.failures))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def slurm_sweep(folders, *overrides: str, **texts: str):
    return run(folders, load(str(CONFIG), [*SMALL, *overrides]), options_of("slurm", texts))


def launch(folders, *overrides: str, **texts: str) -> subprocess.Popen:
    arguments = [str(CONFIG), str(folders[0]), str(folders[1]), json.dumps(texts), *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def counts(folders, name: str) -> list[int]:
    return [len(path.read_text().split()) for path in folders[0].glob(f"runs/*/{name}")]


def test_a_sweep_does_each_run_once_as_tasks_of_an_array(cluster, folders):
    crash, boom, *_ = run_ids()
    (folders[1] / "crash").write_text(crash)
    (folders[1] / "boom").write_text(boom)
    outcome = slurm_sweep(folders)
    assert outcome.failures == {crash: "killed by SIGKILL", boom: "ValueError: boom and more"}
    starts, finishes = (lines(folders, name) for name in ("starts", "finishes"))
    assert [len(starts[run_id]) for run_id in run_ids()] == [2, 2, 1, 1, 1, 1]
    assert [len(finishes[run_id]) for run_id in run_ids()] == [0, 0, 1, 1, 1, 1]
    for order in ("crash", "boom"):
        (folders[1] / order).unlink()
    assert slurm_sweep(folders, jobs="2").failures == {}
    assert_one_result_per_run(folders)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"partition": "nix"}, "--engine.partition = 'nix': Slurm refuses it: sbatch: error: inv"),
        ({"cores": "99"}, r"--engine = '.*--cpus-per-task=99 .*: Requested node configuration is "),
        ({"hosts": "9"}, r"--engine = '--nodes=9 .*: Requested node configuration is not avail"),
        ({"more": "--foo"}, r"--engine = '.* --foo': Slurm refuses it: .*unrecognized option"),
        ({"more": "'"}, r"--engine.more = \"'\": must be options: No closing quotation"),
        ({"time": "soon"}, r"--engine = '--time=soon .*: Invalid --time specification"),
        ({"jobs": "-1"}, "--engine.jobs = -1: must be 0 or more"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_submitted(cluster, folders, texts, reason):
    with pytest.raises(InputError, match=f"^{reason}") as caught:
        slurm_sweep(folders, **texts)
    assert "\n" not in str(caught.value)
    assert not folders[0].exists()


def test_a_refused_plan_is_found_by_one_task_and_leaves_nothing(cluster, folders):
    (folders[1] / "uncheckable").touch()
    with pytest.raises(InputError, match=r"^train.eval_sequences = 1000000: ask for at most 12$"):
        slurm_sweep(folders)
    assert not folders[0].exists()


def test_preemption_a_lost_node_and_a_lost_launcher_leave_one_result_per_run(cluster, folders):
    (folders[1] / "seconds").write_text("8")
    launcher, deadline = launch(folders, *GRID), time.monotonic() + 1500
    wait_for(lambda: len(counts(folders, "starts")) >= 4)
    cancelled = next(job for job, state, *_ in cluster.jobs() if state == "RUNNING")
    cluster.call("scancel", cancelled)
    wait_for(lambda: len(counts(folders, "starts")) >= 10)
    high = ("--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 3")
    cluster.call("sbatch", "--job-name=high", "--output=/dev/null", *high)
    wait_for(lambda: ["high"] in [job[2:3] for job in cluster.jobs("--states=RUNNING")])
    assert cluster.call("squeue", "-h", "--states=RUNNING", "-o", "%j").split() == ["high"]
    wait_for(lambda: cluster.hurry() or len(counts(folders, "finishes")) >= 10, 300)
    cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    launcher.kill()
    launcher.communicate()
    submissions = len(list(folders[0].glob("tasks/*")))
    cluster.call("scontrol", "update", "nodename=n1", "state=resume")
    launcher = launch(folders, *GRID)
    while launcher.poll() is None:
        assert time.monotonic() < deadline
        cluster.hurry()
        time.sleep(1)
    output, errors = launcher.communicate()
    assert output.split() == [b"30", b"0"], errors.decode()
    assert counts(folders, "finishes") == [1] * 30
    assert sum(counts(folders, "starts")) >= 30 + 4, "some were started again"
    assert len(list(folders[0].glob("tasks/*"))) <= submissions + 1, "the rest was taken up"


def test_a_run_is_queued_again_at_its_time_limit(cluster, folders):
    (folders[1] / "seconds").write_text("900")
    launcher = launch(folders, *SMALL, "sweep.sizes=1", time="1", notice="50")
    wait_for(lambda: cluster.call("squeue", "-h", "-r", "-o", "%r").count("BeginTime") == 2, 200)
    assert not counts(folders, "finishes")
    (folders[1] / "stubborn").touch()
    cluster.hurry()
    wait_for(lambda: counts(folders, "starts") == [2, 2])
    (folders[1] / "seconds").write_text("0.1")
    (folders[1] / "stubborn").unlink()
    output, errors = launcher.communicate(timeout=400)
    assert output.split() == [b"2", b"0"], errors.decode()
    assert b"TIMEOUT in Slurm (TimeLimit); once more" in errors
    assert (counts(folders, "starts"), counts(folders, "finishes")) == ([3, 3], [1, 1])


def test_a_signal_to_the_launcher_saves_and_cancels_its_tasks(cluster, folders):
    (folders[1] / "seconds").write_text("900")
    launcher = launch(folders, *GRID)
    wait_for(lambda: len(counts(folders, "starts")) >= 4)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert errors.endswith(b"stopped.saved=True\n"), errors.decode()
    assert cluster.jobs() == []


def test_without_slurm_the_line_says_so(folders, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"^--engine = 'slurm': not on the PATH: sbatch, squeue, "):
        slurm_sweep(folders)


def test_two_nodes_train_one_run_as_one_process_does(cluster, tiny_data_dir, tmp_path, monkeypatch):
    (spec,) = load(str(SINGLE), TINY).specs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def train(workdir: Path, name: str, **texts: str) -> list[dict]:
        outcome = sweeps.sweep(
            load(str(SINGLE), TINY),
            workdir=workdir,
            data_dir=tiny_data_dir,
            engine=options_of(name, texts),
            data_fingerprint="tiny-1",
            only=spec,
        )
        assert outcome.failures == {}
        (record,) = outcome.records
        assert record.device == "2 x cpu"
        text = (workdir / "runs" / spec.run_id / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    with monkeypatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")
        expected = train(tmp_path / "alone", "local")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)  # n1 is no name of this machine
    found = train(tmp_path / "two", "slurm", hosts="2")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & set(other):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (name, line["step"])
