"""Sweeps whose folder is in an object store, by machines that share nothing else."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from modjax import bucket as stores
from modjax.bucket import open_copy
from modjax.cli.main import main
from modjax.errors import InputError
from modjax.scaling import orders, session, workdir
from modjax.scaling.engines.engine import options_of
from modjax.scaling.plan.experiment import load
from modjax.scaling.status import status
from modjax.scaling.sweep import LEASE_OF_A_BUCKET
from modjax.scaling.workers.run_lock import held
from tests.scaling.small_sweep import CONFIG, SMALL, run, run_ids, start, wait_until

URL = "gs://bucket/w"


def of_runs(bucket, name: str) -> dict[str, bytes]:
    """Returns the content of a file in the bucket by the run that has it."""
    found = {i: bucket.objects.get(f"w/runs/{i}/{name}") for i in run_ids()}
    return {run_id: content for run_id, content in found.items() if content is not None}


def in_copies(*copies: Path, name: str) -> list[Path]:
    return [path for copy in copies for path in copy.glob(f"runs/*/{name}")]


def test_two_machines_do_each_run_once(bucket, machine, folders):
    (folders[1] / "seconds").write_text("8")  # until the second one has begun, too
    copies, launchers = [], []
    for name in ("first", "second"):
        copies.append(machine(name))
        launchers.append(start((URL, folders[1]), jobs=1, lease=2.0))
    wait_until(lambda: all(in_copies(copy, name="starts") for copy in copies), 60)
    (folders[1] / "seconds").write_text("0.05")
    for launcher in launchers:
        output, errors = launcher.communicate(timeout=120)
        assert output.split() == [b"6", b"0"], errors.decode()
    finishes = in_copies(*copies, name="finishes")
    assert sorted(path.parent.name for path in finishes) == sorted(run_ids())
    assert len({path.parents[2] for path in finishes}) == 2, "both had a part"
    assert set(of_runs(bucket, "result.json")) == set(run_ids())
    assert all(b"training" in log for log in of_runs(bucket, "log.txt").values())
    sessions = json.loads(bucket.objects["w/sweep.json"])
    assert sorted(i for one in sessions for i in one["finished"]) == sorted(run_ids())
    machine("third")
    assert status(open_copy(URL, writes=False)).count("done") == 6


def test_the_runs_of_a_machine_that_dies_are_taken_over(bucket, machine, folders):
    (folders[1] / "seconds").write_text("2")
    first = machine("first")
    launcher = start((URL, folders[1]), lease=2.0)
    wait_until(lambda: len(in_copies(first, name="starts")) == 2, 60)
    victims = [int(path.read_text()) for path in in_copies(first, name="starts")]
    machine("second")
    (running,) = {
        r.state for r in status(open_copy(URL, writes=False)).runs if r.state != "waiting"
    }
    assert running == "running", "as its lease says"
    for pid in (launcher.pid, *victims):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()
    (folders[1] / "seconds").write_text("0.1")
    found = run((open_copy(URL, writes=True), folders[1]), load(str(CONFIG), SMALL), lease=2.0)
    assert len(found.records) == 6 and not found.failures
    leases = [name for name in bucket.objects if name.endswith("lease-000000002")]
    assert len(leases) == len(victims)


def test_a_sweep_is_stopped_and_runs_are_tried_again_from_another_machine(
    bucket, machine, folders, capsys
):
    boom, *_ = run_ids()
    (folders[1] / "boom").write_text(boom)
    (folders[1] / "seconds").write_text("3")
    first = machine("first")
    launcher = start((URL, folders[1]), lease=1.0)
    wait_until(lambda: f"w/runs/{boom}/failure.json" in bucket.objects, 60)
    machine("second")
    (folders[1] / "boom").write_text("")
    assert main(["logs", boom, f"--workdir={URL}"]) == 0
    assert f"training {boom}" in capsys.readouterr().out
    assert main(["retry", boom, f"--workdir={URL}"]) == 0
    assert f"w/runs/{boom}/failure.json" not in bucket.objects
    starts = first / "runs" / boom / "starts"
    wait_until(lambda: len(starts.read_text().split()) == 3, 60)
    assert main(["stop", f"--workdir={URL}"]) == 0
    _, errors = launcher.communicate(timeout=60)
    assert b"stopped.saved=" in errors
    assert len(of_runs(bucket, "result.json")) < 6


def test_two_launchers_cannot_write_over_each_others_plan(bucket, machine, monkeypatch):
    small = load(str(CONFIG), SMALL)
    grown = load(str(CONFIG), ["sweep.sizes=3", "sweep.budgets=5e11,7e11"])
    other = load(str(CONFIG), ["sweep.sizes=2", "sweep.budgets=7e11"])
    real = workdir.check_claim

    def claim_while(rival, experiment):
        """Claims the bucket for `experiment`, while another machine claims it for `rival`."""

        def check_claim(*arguments):
            monkeypatch.setattr(workdir, "check_claim", real)
            found, kept = real(*arguments), dict(stores._seen)
            workdir.claim(rival, machine("second"), "f")
            machine("first")
            stores._seen.update(kept)
            return found

        monkeypatch.setattr(workdir, "check_claim", check_claim)
        workdir.claim(experiment, machine("first"), "f")

    def planned() -> set[str]:
        return set(json.loads(bucket.objects["w/plan.json"])["runs"])

    with pytest.raises(InputError, match="holds another plan"):
        claim_while(other, small)
    assert planned() == {spec.run_id for spec in other.specs}
    bucket.objects.clear()
    claim_while(small, grown)
    assert planned() == {spec.run_id for spec in grown.specs}
    assert len(planned()) > len(small.specs)


def test_tasks_of_a_scheduler_have_their_folder_in_the_bucket(
    bucket,
    machine,
    folders,
    slurm,
    tmp_path,
):
    boom, *_ = run_ids()
    (folders[1] / "boom").write_text(boom)
    sbatch = slurm.parent / "programs" / "sbatch"
    begin = f"#!/bin/sh\nexport XDG_CACHE_HOME='{tmp_path / 'node'}'\n"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", begin))
    experiment = load(str(CONFIG), SMALL)
    work = open_copy(URL, writes=True), folders[1]
    found = run(work, experiment, options_of("slurm", {}), lease=1.0)
    assert found.failures == {boom: "ValueError: boom and more"}
    assert len(found.records) == 5
    assert len(in_copies(machine("node"), name="finishes")) == 5
    assert not in_copies(machine("first"), name="finishes")
    log = json.loads(of_runs(bucket, "failure.json")[boom])["log"]
    assert "ValueError: boom" in log
    assert len([name for name in bucket.objects if name.startswith("w/tasks/")]) >= 6
    machine("third")
    with pytest.raises(
        InputError, match=r"^--workdir = 'gs://bucket/w': must be a folder that all"
    ):
        run(
            (open_copy(URL, writes=True), folders[1]),
            experiment,
            options_of("slurm", {"hosts": "2"}),
        )


def test_a_bucket_that_was_never_seen_is_read_as_a_folder_is(
    bucket, machine, make_workdir, make_sweep, capsys
):
    here = make_workdir(make_sweep(sizes=5))
    for path in here.rglob("*.json*"):
        bucket.objects[f"w/{path.relative_to(here)}"] = path.read_bytes()
    bucket.objects["w/runs/../../../escaped.json"] = b"{}"
    said = []
    for folder in (here, URL, URL):  # the second time, from what is kept
        assert main(["fit", f"--workdir={folder}", "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert bucket.requests == [], "readers change nothing"


def test_the_report_is_written_to_the_bucket(bucket, machine, make_workdir, make_sweep, capsys):
    here = make_workdir(make_sweep(sizes=5))
    for path in here.rglob("*.json*"):
        bucket.objects[f"w/{path.relative_to(here)}"] = path.read_bytes()
    assert main(["report", f"--workdir={URL}"]) == 0
    assert bucket.objects["w/report.html"] == Path(capsys.readouterr().out.strip()).read_bytes()


@pytest.mark.parametrize("fault", ["refused", "gone", "silent", "read only"])
def test_a_store_that_fails_is_one_line_before_anything_starts(
    bucket, machine, fault, capsys, monkeypatch, tmp_path
):
    url = URL
    if fault == "refused":
        bucket.left = 0
    elif fault == "gone":
        url = "gs://another/w"
    elif fault == "silent":
        monkeypatch.setattr(stores, "FEW_RETRIES", {"gcs_request_retries": {"max_retries": 1}})
        bucket.close()
    else:
        bucket.refuse.add("w/.modjax")
    monkeypatch.setattr(session, "Session", None)
    arguments = [f"--config={CONFIG}", f"--workdir={url}", f"--data-dir={tmp_path}"]
    assert main(["sweep", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"modjax: --workdir = '{url}': cannot be used: ")


def test_what_is_no_bucket_is_one_line(capsys):
    for url in ("memory://x", "gs://bucket/../x", "file:///x"):
        assert main(["status", f"--workdir={url}"]) == 2
        assert "must be a folder, gs://BUCKET/FOLDER or s3://" in capsys.readouterr().err


def test_a_run_of_several_hosts_is_refused(bucket, machine, data_dir, capsys):
    run_id = load(str(CONFIG), []).specs[0].run_id
    arguments = [f"--config={CONFIG}", f"--run={run_id}", f"--data-dir={data_dir}"]
    assert main(["train", "--distributed", f"--workdir={URL}", *arguments]) == 2
    assert "a folder that all hosts share, no bucket" in capsys.readouterr().err


def test_stop_is_not_asked_for_at_each_look(bucket, machine, folders, monkeypatch):
    asked, real, began = [], orders.last_stop, time.monotonic()
    monkeypatch.setattr(session, "last_stop", lambda workdir: asked.append(1) or real(workdir))
    run((open_copy(URL, writes=True), folders[1]), load(str(CONFIG), SMALL))
    most = 2 + (time.monotonic() - began) / (LEASE_OF_A_BUCKET / session.LOOKS)
    assert 2 <= len(asked) <= most


def test_what_has_not_changed_is_not_fetched_again(bucket, machine):
    bucket.objects |= {"w/plan.json": b"{}", "w/runs/a/metrics.jsonl": b"1\n", "w/stop": b"1"}
    copy = open_copy(URL, writes=False)
    assert sorted(bucket.sent) == sorted(bucket.objects)
    bucket.sent.clear()
    machine("first")  # another process
    open_copy(URL, writes=False)
    assert bucket.sent == []
    stores.write(copy / "runs" / "a" / "metrics.jsonl", b"1\n2\n")
    bucket.objects.pop("w/plan.json")
    machine("first")
    open_copy(URL, writes=False)
    assert bucket.sent == ["w/runs/a/metrics.jsonl"]
    assert (copy / "runs" / "a" / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert not (copy / "plan.json").exists()


def test_a_reader_leaves_the_files_of_a_run_that_is_done_here_alone(bucket, machine):
    metrics = machine("first") / "runs" / "a" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    bucket.objects["w/runs/a/metrics.jsonl"] = b"1\n"
    with held(metrics.parent, 10.0) as guard, open(metrics, "a") as file:
        assert guard is not None
        file.write("2\n")
        file.flush()
        open_copy(URL, writes=False)
        assert metrics.read_bytes() == b"1\n2\n"
        with held(metrics.parent, 10.0) as other:
            assert other is None
    open_copy(URL, writes=False)
    assert metrics.read_bytes() == b"1\n"


def test_a_finished_run_is_read_from_a_bucket(
    bucket, machine, finished_workdir, tiny_data_dir, capsys
):
    for path in filter(Path.is_file, finished_workdir.rglob("*")):
        bucket.objects[f"w/{path.relative_to(finished_workdir)}"] = path.read_bytes()
    said = []
    for folder in (finished_workdir, URL):
        arguments = [f"--workdir={folder}", f"--data-dir={tiny_data_dir}", "--prompt=ab"]
        assert main(["sample", *arguments, "--tokens=4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert bucket.requests == []
