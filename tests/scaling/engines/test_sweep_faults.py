"""Faults around a sweep: each is named in one line, hides no other run, and is no success."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.files import lock
from modjax.records import write_record
from modjax.scaling import session
from modjax.scaling.plan.experiment import load
from modjax.scaling.status import status
from tests.scaling.small_sweep import CONFIG, SMALL, alive, lines, run_ids, start, sweep, wait_until
from tests.scaling.stand_in import record_of
from tests.scaling.workers.worker_messages import settings, worker_says

DEEP = "[" * 100_000


def processes(folders, monkeypatch) -> Path:
    """Returns a file that gets a line from every worker process that starts."""
    path = folders[1] / "processes"
    path.touch()
    monkeypatch.setenv("STAND_IN_PROCESSES", str(path))
    return path


@pytest.mark.parametrize("content", [b'{"run_id": ', b"\xff\xfe\x00", DEEP.encode(), b"[]", b"3"])
def test_a_damaged_result_is_named_with_its_remedy_and_hides_no_other_run(folders, content):
    sweep(folders)
    bad = run_ids()[0]
    (folders[0] / "runs" / bad / "result.json").write_bytes(content)
    outcome = sweep(folders)
    assert len(outcome.records) == 5
    assert list(outcome.failures) == [bad]
    assert (
        "result.json = 'damaged or missing': delete it to run this cell again"
        in outcome.failures[bad]
    )
    assert "\n" not in outcome.failures[bad]
    found = status(folders[0])
    assert (found.count("damaged"), found.count("done")) == (1, 5)
    assert [run.why for run in found.runs if run.state == "damaged"] == [outcome.failures[bad]]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", DEEP.encode(), b"[1]", b'{"runs": 3}'])
@pytest.mark.parametrize(
    "verb", [sweep, lambda folders: status(folders[0])], ids=["sweep", "status"]
)
def test_a_damaged_plan_is_one_line_with_its_remedy(folders, content, verb):
    sweep(folders)
    (folders[0] / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json.*damaged.*delete it") as caught:
        verb(folders)
    assert "\n" not in str(caught.value)
    (folders[0] / "plan.json").unlink()
    assert len(sweep(folders).records) == 6, "the remedy helps"


def test_a_damaged_account_is_set_aside_and_a_new_one_begun(folders):
    sweep(folders)
    (folders[0] / "sweep.json").write_bytes(b"\xff[")
    sweep(folders)
    assert (folders[0] / "sweep.json.damaged").read_bytes() == b"\xff["
    assert len(json.loads((folders[0] / "sweep.json").read_text())) == 1


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", DEEP.encode()])
def test_a_damaged_failure_or_spec_hides_no_other_run(folders, content):
    sweep(folders)
    for name, run_id in zip(("failure.json", "spec.json"), run_ids(), strict=False):
        (folders[0] / "runs" / run_id / "result.json").unlink()
        (folders[0] / "runs" / run_id / name).write_bytes(content)
    found = status(folders[0])
    assert [run.state for run in found.runs] == ["failed", "damaged", *["done"] * 4]
    assert all("\n" not in run.why for run in found.runs) and "damaged" in found.runs[0].why


def test_what_a_worker_would_refuse_is_found_before_the_plan_is_claimed(folders):
    (folders[1] / "uncheckable").touch()
    with pytest.raises(InputError, match=r"^train.eval_sequences = 1000000: ask for at most 12$"):
        sweep(folders)
    assert not folders[0].exists()


def test_a_worker_that_aborts_is_named_with_its_last_words(folders, monkeypatch):
    monkeypatch.setenv("STAND_IN_ABORTS", "1")
    with pytest.raises(InputError) as caught:
        sweep(folders, jobs=1)
    assert str(caught.value) == (
        "worker = 'killed by SIGABRT': died 3 times before it had a run: Unknown flag"
    )
    assert not folders[0].exists()


def test_a_machine_that_refuses_is_one_line_before_the_plan_is_claimed(folders):
    (folders[1] / "no_files").touch()
    with pytest.raises(InputError, match=rf"^{folders[0]}: Too many open files$"):
        sweep(folders, jobs=1)
    assert not folders[0].exists()


def test_a_fault_before_the_first_run_keeps_the_workers_traceback(folders):
    (folders[1] / "unforeseen").touch()
    with pytest.raises(RuntimeError, match=r"^workers cannot start: KeyError: 'unf") as found:
        sweep(folders, jobs=1)
    (note,) = found.value.__notes__
    assert 'raise KeyError("unforeseen")' in note and note.endswith("KeyError: 'unforeseen'\n")


def test_an_exception_in_a_worker_reaches_the_launcher_and_ends_the_run(folders, capsys):
    bad = run_ids()[-1]
    (folders[1] / "boom").write_text(bad)
    outcome = sweep(folders)
    assert outcome.failures == {bad: "ValueError: boom and more"} and len(outcome.records) == 5
    err = capsys.readouterr().err
    assert f"{bad}: ValueError: boom and more; once more" in err
    assert 'raise ValueError("boom' in (folders[0] / "runs" / bad / "log.txt").read_text()


@pytest.mark.parametrize(
    ("line", "event", "words"),
    [
        ({"spec": {"variant": "x"}}, "refused", "budget_flops = None: missing"),
        ({"check": [{"colour": 1}]}, "refused", "colour = 1: unknown"),
        (b"not json\n", "broken", "JSONDecodeError"),
        (b"\xff\xfe\n", "broken", "UnicodeDecodeError"),
    ],
)
def test_a_worker_that_cannot_read_its_order_says_so(folders, line, event, words):
    order = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    said, _ = worker_says(settings(folders[0], "stand_in"), order)
    assert [message["event"] for message in said] == ["ready", event]
    assert words in said[1]["error"]


def test_a_run_without_progress_is_said(folders, monkeypatch, capsys):
    monkeypatch.setattr(session, "SECONDS_OF_SILENCE", 0.3)
    (folders[1] / "seconds").write_text("20")  # a line of progress each second
    (folders[1] / "quick").write_text(" ".join(run_ids()[1:]))
    threading.Timer(3.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(session.Stopped):
        sweep(folders, jobs=1)
    assert f"{run_ids()[0]}: no progress for 0s, compiling or stuck; see" in capsys.readouterr().err


def test_the_mesh_that_a_run_chooses_is_said_and_logged(folders, capsys):
    first, second = run_ids()[:2]
    (folders[1] / "choose").write_text(first)
    sweep(folders, jobs=1)
    said, err = "mesh: data 4, fsdp 2; remat: full", capsys.readouterr().err
    assert err.count(f"{first}: {said}\n") == 1 == err.count("mesh:")
    logs = [(folders[0] / "runs" / run_id / "log.txt").read_text() for run_id in (first, second)]
    assert f"modjax: {said}\n" in logs[0] and "mesh" not in logs[1]


def test_a_worker_ended_by_sigterm_is_no_failure_of_its_run(folders):
    (folders[1] / "seconds").write_text("1.5")
    (folders[1] / "quick").write_text(" ".join(run_ids()[1:]))
    process, first = start(folders, jobs=1), run_ids()[0]
    for times in range(1, session.MAX_ATTEMPTS + 2):
        wait_until(lambda times=times: len(lines(folders, "starts")[first]) == times)
        os.kill(int(lines(folders, "starts")[first][-1]), signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.split()) == (0, [b"6", b"0"]), errors.decode()


def test_a_signal_to_launcher_and_workers_together_starts_no_worker(folders, monkeypatch):
    started = processes(folders, monkeypatch)
    (folders[1] / "seconds").write_text("30")
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2)
    for pid in map(int, started.read_text().split()):
        os.kill(pid, signal.SIGTERM)
    process.terminate()
    process.communicate(timeout=20)
    assert len(started.read_text().split()) == 2


def test_a_second_signal_kills_the_workers_and_does_not_claim_that_they_saved(folders):
    (folders[1] / "seconds").write_text("30")
    (folders[1] / "stubborn").touch()
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "waits for the workers to save"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert b"saved=False" in errors
    pids = {int(pid) for starts in lines(folders, "starts").values() for pid in starts}
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_moved_or_deleted_in_the_middle_is_said_and_not_made_anew(folders, how, tmp_path):
    (folders[1] / "seconds").write_text("1")
    process = start(folders)
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2)
    if how == "moved":
        folders[0].rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folders[0])
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, "the driver's traceback; the command line ends with 2"
    assert b"was moved or deleted in the middle of a run" in errors.splitlines()[-1]
    assert not folders[0].exists()
    if how == "moved":
        (tmp_path / "elsewhere").rename(folders[0])
        assert len(sweep(folders).records) == 6


def test_what_another_launcher_finished_is_counted_apart(folders):
    (folders[1] / "seconds").write_text("1")
    (folders[1] / "quick").write_text(" ".join(run_ids()[1:]))
    spec = load(str(CONFIG), SMALL).specs[-1]
    folder = folders[0] / "runs" / spec.run_id
    process = start(folders, jobs=1)
    wait_until(lambda: lines(folders, "starts")[run_ids()[0]])
    write_record(folder, record_of(spec))
    process.communicate(timeout=60)
    (session,) = json.loads((folders[0] / "sweep.json").read_text())
    assert session["found"] == [spec.run_id] and spec.run_id not in session["finished"]
    assert len(session["finished"]) == 5
    assert session["train_seconds"] == pytest.approx(5 * 0.8), "as the stand-in's records say"


def test_a_launcher_with_nothing_left_says_for_whose_runs_it_waits(folders):
    (folders[1] / "seconds").write_text("0.05")
    sweep(folders)
    last = run_ids()[-1]
    (folders[0] / "runs" / last / "result.json").unlink()
    with lock(folders[0] / "runs" / last / "lock"):
        process = start(folders)
        said = next(line for line in process.stderr if b"nothing left to do" in line)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"to wait for another sweep's {last}" in said.decode()


def test_nothing_in_the_current_folder_passes_for_a_package_in_a_worker(
    folders, tmp_path, monkeypatch
):
    marker = tmp_path / "executed"
    for name in ("queue", "jax", "numpy", "modjax"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    assert len(sweep(folders).records) == 6
    assert not marker.exists()


def test_the_status_of_someone_elses_sweep_needs_no_right_to_write(folders):
    sweep(folders)
    (folders[0] / "runs" / run_ids()[0] / "result.json").unlink()
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders are closed to others
        theirs = Path(public) / "work"
        shutil.copytree(folders[0], theirs)
        folders_of = [Path(public), theirs, *theirs.rglob("*")]
        for path in folders_of:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            done = _as_nobody(f"print(status(Path({str(theirs)!r})))")
        finally:
            for path in folders_of:
                path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("state='done'") == 5 and "state='waiting'" in done.stdout


def _as_nobody(code: str) -> subprocess.CompletedProcess:
    """Runs code as a user who owns nothing here; root could write anywhere."""
    script = f"""
import os
from pathlib import Path
from modjax.scaling.status import status
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
{code}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
