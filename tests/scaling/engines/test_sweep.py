"""Sweeps with real worker processes and real kills. Training is a stand-in."""

import contextlib
import json
import os
import signal
import threading

import pytest

from modjax.errors import InputError
from modjax.files import is_disk_full
from modjax.scaling import sweep as sweeps
from modjax.scaling.engines import pool
from modjax.scaling.plan.experiment import load
from modjax.scaling.status import status
from modjax.scaling.workdir import claim
from modjax.scaling.workers import run_lock as runs
from tests.scaling.small_sweep import (
    CONFIG,
    SMALL,
    alive,
    assert_one_result_per_run,
    lines,
    run_ids,
    start,
    sweep,
    wait_until,
)


def test_a_sweep_ends_with_one_result_per_run_and_repeats_none(folders):
    outcome = sweep(folders)
    assert {record.run_id for record in outcome.records} == set(run_ids())
    assert outcome.failures == {}
    assert_one_result_per_run(folders)
    again = sweep(folders)
    assert len(again.records) == len(run_ids())
    assert all(len(starts) == 1 for starts in lines(folders, "starts").values())
    sessions = json.loads((folders[0] / "sweep.json").read_text())
    assert [len(session["finished"]) for session in sessions] == [6, 0]


def test_workers_are_reused_and_imports_paid_once(folders):
    sweep(folders, jobs=2)
    pids = {pid for starts in lines(folders, "starts").values() for pid in starts}
    assert len(pids) == 2


def test_a_worker_is_renewed_after_so_many_runs_and_none_is_lost(folders, monkeypatch):
    monkeypatch.setattr(pool, "RUNS_OF_A_WORKER", 2)
    outcome = sweep(folders, jobs=1)
    assert len(outcome.records) == 6 and outcome.failures == {}
    pids = [pid for starts in lines(folders, "starts").values() for pid in starts]
    assert sorted(map(pids.count, set(pids))) == [2, 2, 2]
    assert_one_result_per_run(folders)


def test_a_killed_worker_is_replaced_and_its_run_done_again(folders):
    (folders[1] / "seconds").write_text("0.6")
    process = start(folders)
    wait_until(lambda: any(lines(folders, "starts").values()))
    victim = next(int(pids[0]) for pids in lines(folders, "starts").values() if pids)
    os.kill(victim, signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert output.split() == [b"6", b"0"]
    assert b"killed by SIGKILL; once more" in errors
    assert sorted(len(s) for s in lines(folders, "starts").values()) == [1, 1, 1, 1, 1, 2]
    assert_one_result_per_run(folders)


def test_a_killed_sweep_leaves_no_worker_behind_and_goes_on_when_restarted(folders):
    (folders[1] / "seconds").write_text("60")
    (folders[1] / "quick").write_text(run_ids()[0])
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 3)
    process.kill()
    process.communicate()
    pids = {int(pid) for starts in lines(folders, "starts").values() for pid in starts}
    wait_until(lambda: not any(alive(pid) for pid in pids))
    (folders[1] / "seconds").write_text("0.05")
    assert len(sweep(folders).records) == 6
    assert_one_result_per_run(folders)


def test_two_sweeps_on_one_folder_share_the_runs(folders):
    (folders[1] / "seconds").write_text("0.4")
    first, second = start(folders), start(folders)
    for process in (first, second):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        assert output.split() == [b"6", b"0"], "both end with the whole plan's results"
    assert all(len(starts) == 1 for starts in lines(folders, "starts").values())
    assert len({pid for starts in lines(folders, "starts").values() for pid in starts}) >= 2
    assert_one_result_per_run(folders)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_sweep_in_good_order(folders, number):
    (folders[1] / "seconds").write_text("30")
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert b"Stopped: " + number.name.encode() in errors
    pids = {int(pid) for starts in lines(folders, "starts").values() for pid in starts}
    assert not any(alive(pid) for pid in pids)


def test_a_run_that_fails_twice_is_given_up_and_the_sweep_goes_on(folders):
    bad = run_ids()[0]
    (folders[1] / "crash").write_text(bad)
    outcome = sweep(folders)
    assert outcome.failures == {bad: "killed by SIGKILL"}
    assert len(outcome.records) == 5
    assert len(lines(folders, "starts")[bad]) == 2
    failure = json.loads((folders[0] / "runs" / bad / "failure.json").read_text())
    assert f"training {bad}" in failure["log"]
    found = status(folders[0])
    assert found.count("failed") == 1 and found.count("done") == 5

    (folders[1] / "crash").unlink()
    assert sweep(folders).failures == {}, "a restart tries again"
    assert status(folders[0]).count("done") == 6


def test_a_diverged_run_is_a_result_and_is_not_repeated(folders):
    bad = run_ids()[0]
    (folders[1] / "diverge").write_text(bad)
    assert sweep(folders).failures == {}
    assert len(sweep(folders).records) == 6
    assert len(lines(folders, "starts")[bad]) == 1
    found = status(folders[0])
    assert (found.count("diverged"), found.count("done")) == (1, 5)
    assert next(r.why for r in found.runs if r.run_id == bad) == "loss not finite at step 7"


def test_bad_input_of_the_first_run_stops_the_sweep_in_the_workers_words(folders):
    (folders[1] / "refuse").write_text(" ".join(run_ids()))
    with pytest.raises(InputError, match=r"^train.batch_size = 7: must be a multiple"):
        sweep(folders)


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_finished(folders):
    (folders[1] / "disk_full").write_text(run_ids()[-1])
    with pytest.raises(OSError, match="No space left") as caught:
        sweep(folders, jobs=1)
    assert is_disk_full(caught.value)
    assert sum(map(bool, lines(folders, "finishes").values())) == 5


def test_workers_that_cannot_start_end_the_sweep_with_their_words(folders, monkeypatch):
    monkeypatch.setattr(sweeps, "JOB", "no_such_module")
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        sweep(folders, jobs=1)
    assert not folders[0].exists()


def test_a_folder_of_another_plan_is_refused_but_a_plan_may_grow(folders):
    sweep(folders)
    with pytest.raises(InputError, match=r"--workdir = .*another plan \(6 of its runs"):
        sweep(folders, "train.b2=0.9")
    with pytest.raises(InputError, match="other data"):
        sweep(folders, fingerprint="g")
    grown = sweep(folders, "sweep.seeds=0,1")
    assert len(grown.records) == 12
    assert all(len(starts) == 1 for starts in lines(folders, "starts").values())


def test_the_plan_keeps_the_command_that_made_it(folders):
    def claimed(command: str, *overrides: str) -> str:
        claim(load(str(CONFIG), [*SMALL, *overrides], command), folders[0], "f")
        return json.loads((folders[0] / "plan.json").read_text())["command"]

    assert claimed("modjax sweep first") == "modjax sweep first"
    assert claimed("modjax train --run=one") == "modjax sweep first"
    assert claimed("modjax sweep grown", "sweep.seeds=0,1") == "modjax sweep grown"


def test_overhead_is_not_given_where_a_run_was_begun_by_an_earlier_session(folders):
    sweep(folders)
    folder = folders[0] / "runs" / run_ids()[0]
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").touch()
    sweep(folders)
    first, resumed = json.loads((folders[0] / "sweep.json").read_text())
    assert resumed["finished"] == [run_ids()[0]]
    assert first["overhead"] < 1 and resumed["overhead"] is None


def test_a_run_that_is_being_looked_at_still_starts(folders):
    spec = load(str(CONFIG), SMALL).specs[0]
    folder = runs.run_dir(folders[0], spec.run_id)
    folder.mkdir(parents=True)

    def run():
        return runs.run(spec, folders[0], train=lambda folder, guard: folder.name)

    with contextlib.ExitStack() as looking:
        (folder / "lock").touch()  # by the session before; whoever looks makes none
        looking.enter_context(runs.lock(folder / "lock", shared=True))
        threading.Timer(0.2, looking.close).start()
        assert run() == (spec.run_id, True)
    with runs.lock(folder / "lock"):
        assert run() is None, "another process holds it for longer"


def test_status_tells_running_from_waiting_by_the_lock(folders):
    (folders[1] / "seconds").write_text("30")
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2)
    found = status(folders[0])
    assert (found.count("running"), found.count("waiting")) == (2, 4)
    assert found.remaining_seconds > 0
    process.terminate()
    process.communicate(timeout=20)
    assert status(folders[0]).count("waiting") == 6
