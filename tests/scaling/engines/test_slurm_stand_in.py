"""Sweeps through a stand-in for Slurm, and the engine of batch schedulers that it is made of.

test_slurm.py has the same on a real Slurm.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.scaling.engines import batch
from modjax.scaling.engines.engine import Event, Refused, options_of
from modjax.scaling.engines.slurm import Slurm
from modjax.scaling.plan.experiment import load
from modjax.scaling.workers.task import Tasks
from modjax.scaling.workers.worker import Settings
from modjax.specs import Execution, to_dict
from tests.scaling.small_sweep import (
    CONFIG,
    SMALL,
    assert_one_result_per_run,
    lines,
    run,
    run_ids,
    wait_until,
)


def settings_of(folders) -> Settings:
    workdir, data_dir = map(str, folders)
    return Settings("stand_in", workdir, data_dir, "f", Execution(), {}, {}, False)


def slurm_sweep(folders, **texts: str):
    return run(folders, load(str(CONFIG), SMALL), options_of("slurm", texts))


def test_a_sweep_does_each_run_once_in_one_array(folders, slurm):
    crash, refused, *_ = run_ids()
    (folders[1] / "crash").write_text(crash)
    (folders[1] / "boom").write_text(refused)
    outcome = slurm_sweep(folders, partition="low", cores="2", memory="1.5", more="--qos='a b'")
    assert outcome.failures == {crash: "killed by SIGKILL", refused: "ValueError: boom and more"}
    starts, finishes = (lines(folders, name) for name in ("starts", "finishes"))
    assert [len(starts[run_id]) for run_id in run_ids()] == [2, 2, 1, 1, 1, 1]
    assert [len(finishes[run_id]) for run_id in run_ids()] == [0, 0, 1, 1, 1, 1]
    called = (slurm / "called").read_text()
    assert "--array=0-5" in called
    needs = "--partition=low --nodes=1 --ntasks-per-node=1 --cpus-per-task=2 --mem=1536M"
    assert f"{needs} --signal=B:USR2@120 '--qos=a b'" in called
    assert "--test-only" in called.splitlines()[0]


def test_stopped_tasks_save_and_ask_to_be_started_again(folders, slurm):
    (folders[1] / "seconds").write_text("60")

    def stop_all() -> None:
        wait_until(lambda: all(lines(folders, "starts").values()), 60)
        (folders[1] / "seconds").write_text("0.05")
        for (pid,) in lines(folders, "starts").values():
            os.kill(int(pid), signal.SIGUSR2)

    stopping = threading.Thread(target=stop_all)
    stopping.start()
    assert slurm_sweep(folders).failures == {}
    stopping.join()
    assert all(len(starts) == 2 for starts in lines(folders, "starts").values())
    assert_one_result_per_run(folders)
    assert (slurm / "called").read_text().count("--array=0-5") == 1, "by Slurm, not by the launcher"


def events_until(engine, kind: str, count: int = 1) -> list[Event]:
    """Returns the events until so many of a kind have come."""
    events, deadline = [], time.monotonic() + 60
    while sum(event.kind == kind for event in events) < count:
        assert time.monotonic() < deadline, events
        events += engine.events(0.05)
    return events


def test_the_next_launcher_takes_up_the_tasks_of_a_lost_one(folders, slurm):
    (folders[1] / "seconds").write_text("60")
    specs, settings = load(str(CONFIG), SMALL).specs, settings_of(folders)
    for spec in specs:
        (folders[0] / "runs" / spec.run_id).mkdir(parents=True)
    lost = Slurm().open(settings, 6)
    lost.start(specs[:3])
    assert {e.run_id for e in events_until(lost, "started", 3)} == {s.run_id for s in specs[:3]}

    engine = Slurm(jobs=4).open(settings, 6)
    engine.check(specs[:3])
    assert [event.kind for event in engine.events(0)] == ["checked"], "they have been before"
    engine.start(specs[:3])
    assert engine.room() == 1
    assert "--array=0-0" not in (slurm / "called").read_text()
    wait_until(lambda: sum(map(len, lines(folders, "starts").values())) == 3, 60)
    assert engine.stop([signal.SIGTERM])
    ends = [json.loads(path.read_text())["kind"] for path in folders[0].glob("tasks/*/[0-9].json")]
    assert ends == ["preempted"] * 3
    assert list(engine.events(0)) == []


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("uncheckable", "^train.eval_sequences = 1000000: ask for at most 12$"),
        (
            "unforeseen",
            "^python = .*: does no runs there: KeyError: 'unforeseen'; KeyError: .*; see /",
        ),
        ("no_files", "^.*work: Too many open files$"),
    ],
)
def test_the_first_task_refuses_a_plan_in_one_line(folders, slurm, order, reason):
    (folders[1] / order).touch()
    with pytest.raises(InputError, match=reason) as caught:
        slurm_sweep(folders)
    assert "\n" not in str(caught.value)
    assert not (folders[0] / "plan.json").exists()
    assert "--array=0-5" not in (slurm / "called").read_text()


def test_bad_options_are_refused_before_anything_is_submitted(folders, slurm, monkeypatch):
    (slurm / "refuse").write_text("sbatch: error: invalid partition specified: nix\n")
    with pytest.raises(InputError, match=r"^--engine.partition = 'nix': Slurm refuses it: sbat"):
        slurm_sweep(folders, partition="nix")
    (slurm / "refuse").write_text("Requested node configuration is not available\n")
    with pytest.raises(InputError, match=r"^--engine = '--nodes=1 .*: Requested node configur"):
        slurm_sweep(folders)
    with pytest.raises(InputError, match=r"^--engine.more = \"'\": must be options"):
        slurm_sweep(folders, more="'")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"^--engine = 'slurm': not on the PATH: sbatch, squeue, "):
        slurm_sweep(folders)
    assert not folders[0].exists()


class Planned(batch.Batch):
    """An engine whose scheduler says what a test puts into `states`, by number."""

    def __init__(self, folders):
        super().__init__(settings_of(folders), 6, 0, False, "")
        self.states, self.submitted, self.numbers, self.fault = {}, [], [], ""

    def submit(self, folder, numbers):
        if self.fault:
            raise OSError(5, self.fault)
        self.submitted.append(folder)
        self.numbers.append(list(numbers))

    def look(self):
        return {
            (folder.name, number): state
            for folder in self.submitted
            for number, state in self.states.items()
        }

    def cancel(self, names, save):
        self.states = {}


@pytest.fixture
def planned(folders, quick):
    """Returns an engine that has started one run, and its spec."""
    spec = load(str(CONFIG), SMALL).specs[0]
    engine = Planned(folders)
    engine.states = {0: ("waiting", "")}
    engine.start([spec])
    assert list(engine.events(0)) == [] and len(engine.submitted) == 1
    return engine


@pytest.mark.parametrize("said", [("node lost", "NODE_FAIL"), ("out of memory", "x"), None])
def test_a_task_that_has_gone_ends_as_the_scheduler_says(planned, said):
    planned.states = {} if said is None else {0: said}
    (event,) = events_until(planned, said[0] if said else "node lost")
    assert event.why == (said[1] if said else "the scheduler has forgotten its task")
    assert list(planned.events(0)) == [] and planned.stop([])


def test_a_task_that_is_queued_again_is_still_under_way(planned):
    run_id = run_ids()[0]
    planned.states[0] = ("running", "")
    assert [e[:2] for e in events_until(planned, "started")] == [("started", run_id)]
    file = planned.submitted[0] / "0.json"
    file.write_text(json.dumps({"kind": "preempted", "why": "stopped"}))
    planned.states[0] = ("waiting", "")
    assert [e[:2] for e in events_until(planned, "waiting")] == [("waiting", run_id)]
    assert list(planned.events(0.5)) == [] and list(planned.events(0.2)) == []
    planned.states = {}
    assert [e[0::2][:2] for e in events_until(planned, "preempted")] == [("preempted", "stopped")]


def test_progress_is_read_from_the_metrics_and_a_late_result_is_seen(planned, folders):
    run_id = run_ids()[0]
    planned.states[0] = ("running", "")
    events_until(planned, "started")
    folder = folders[0] / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 3.0}\n')
    (event,) = events_until(planned, "progress")
    assert event.step == 7
    planned.states = {}
    list(planned.events(0.15))
    (planned.submitted[0] / "0.json").write_text(json.dumps({"kind": "done", "why": ""}))
    assert [e.kind for e in planned.events(0)] == ["done"]


def test_a_scheduler_that_does_not_answer_is_asked_again(planned):
    planned.fault = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    planned.start(load(str(CONFIG), SMALL).specs[1:3])
    (note,) = events_until(planned, "note")
    assert note.why == "sbatch: error: QOSMaxSubmitJobPerUserLimit; trying again"
    assert list(planned.events(0.15)) == [], "it says so once, and no task has gone"
    planned.fault = ""
    list(planned.events(0.15))
    assert len(planned.submitted) == 2


def test_tasks_that_a_failed_submission_left_out_are_submitted_again(folders, quick):
    engine = Planned(folders)

    def submit(folder, numbers):
        engine.states |= {n: ("waiting", "quota") for n in numbers[:2]}
        Planned.submit(engine, folder, numbers)
        if len(numbers) > 2:
            raise OSError(5, "exceeded quota")

    engine.submit = submit
    engine.start(load(str(CONFIG), SMALL).specs[:5])
    events = [event for _ in range(9) for event in engine.events(0.11)]
    assert engine.numbers == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
    assert [e[0::2][:2] for e in events] == [
        ("note", "exceeded quota; trying again"),
        ("note", "a task waits: quota"),
    ]


@pytest.mark.parametrize(("kind", "error"), [("fault", Refused), ("disk full", OSError)])
def test_an_end_that_would_stop_all_runs_is_raised(planned, kind, error):
    (planned.submitted[0] / "0.json").write_text(json.dumps({"kind": kind, "why": "the reason"}))
    with pytest.raises(error):
        list(planned.events(0))


def task(folders, tmp_path: Path) -> subprocess.Popen:
    """Starts the first run of the plan as task 0 of a folder."""
    spec = load(str(CONFIG), SMALL).specs[0]
    (folders[0] / "runs" / spec.run_id).mkdir(parents=True, exist_ok=True)
    orders = ({"spec": to_dict(spec)},)
    tasks = Tasks(settings_of(folders), orders, (spec.run_id,), again=f"touch {tmp_path}/again")
    (tmp_path / "tasks.json").write_text(json.dumps(to_dict(tasks)))
    command = [sys.executable, "-P", "-m", "modjax.scaling.workers.task", str(tmp_path), "0"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("order", "kind", "code"), [("quick", "done", 0), ("refuse", "refused", 1), ("boom", "died", 1)]
)
def test_a_task_writes_how_it_ended(folders, tmp_path, order, kind, code):
    (folders[1] / order).write_text(run_ids()[0])
    (tmp_path / "0.json").write_text('{"kind": "preempted", "why": "of the time before"}')
    assert task(folders, tmp_path).wait(60) == code
    assert json.loads((tmp_path / "0.json").read_text())["kind"] == kind
    assert not (tmp_path / "again").exists()


def test_a_task_that_dies_leaves_no_end_of_the_time_before(folders, tmp_path):
    (folders[1] / "crash").write_text(run_ids()[0])
    (tmp_path / "0.json").write_text('{"kind": "preempted", "why": "of the time before"}')
    assert task(folders, tmp_path).wait(60) == -signal.SIGKILL
    assert not (tmp_path / "0.json").exists(), "else it would lose no attempt"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_task_that_is_stopped_exits_with_75_and_asks_for_more_if_it_makes_room(
    folders, tmp_path, number
):
    (folders[1] / "seconds").write_text("60")
    process = task(folders, tmp_path)
    wait_until(lambda: lines(folders, "starts")[run_ids()[0]], 60)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert json.loads((tmp_path / "0.json").read_text())["kind"] == "preempted"
    # SIGTERM may be a cancel, which must not bring the task back.
    assert (tmp_path / "again").exists() == (number == signal.SIGUSR2)
