"""Readers change nothing in a run's folder, and never mistake one run for another."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from modjax.cli.main import main
from modjax.errors import InputError
from modjax.finished.runs import choose, load, open_run
from modjax.records import read_records, run_dir, scan, write_json, write_record

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
UNFINISHED = "31.orbax-checkpoint-tmp-7"  # as orbax names a checkpoint that is being written


@pytest.fixture
def workdir(finished_workdir, tmp_path):
    """A copy of the sweep with one finished run, a plan, a lock and half a checkpoint."""
    workdir = tmp_path / "work"
    shutil.copytree(finished_workdir, workdir)
    run_id = scan(workdir).records[0].run_id
    half = run_dir(workdir, run_id) / "checkpoints" / UNFINISHED / "state"
    half.mkdir(parents=True)
    (half / "d").write_bytes(b"half")
    plan = {"config_file": "c.py", "command": "c", "config": {}, "data_fingerprint": "tiny-1"}
    write_json(workdir / "plan.json", plan | {"runs": [run_id]})
    (run_dir(workdir, run_id) / "lock").touch()
    return workdir


@pytest.fixture
def folder(workdir):
    """Returns the folder of the run."""
    (record,) = read_records(workdir)
    return run_dir(workdir, record.run_id)


def snapshot(root):
    """Returns the name, times and bytes of `root` and everything below it."""
    found = {}
    for path in [root, *root.rglob("*")]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        status = path.lstat()
        found[path] = (status.st_mtime_ns, status.st_ino, status.st_size, digest)
    return found


def read(workdir, folder, data_dir):
    """Opens the run with every reader that accepts it."""
    for verb in ("status", "fit", "report"):
        main([verb, f"--workdir={workdir}"])
    for open_it in (
        lambda: load(folder),
        lambda: open_run(choose(workdir, None).specs[0], workdir=workdir, data_dir=data_dir),
    ):
        try:
            open_it()
        except InputError:
            pass


@pytest.mark.parametrize(
    "harm", [None, "running", "last checkpoint gone", "last checkpoint damaged", "spec gone"]
)
def test_no_reader_changes_anything_in_a_runs_folder(workdir, folder, tiny_data_dir, harm):
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "30", checkpoints / "20")
    if harm == "running":
        (folder / "result.json").unlink()
    elif harm == "last checkpoint gone":
        shutil.rmtree(checkpoints / "30")
    elif harm == "last checkpoint damaged":
        (checkpoints / "30" / "digest.json").write_text("{}")
    elif harm == "spec gone":
        (folder / "spec.json").unlink()
    before = snapshot(workdir / "runs")
    assert any(path.name == UNFINISHED for path in before)
    read(workdir, folder, tiny_data_dir)
    assert snapshot(workdir / "runs") == before


def test_a_run_in_progress_has_no_weights_to_load(folder):
    (folder / "result.json").unlink()
    with pytest.raises(InputError, match=r"= 'unfinished': the run has not finished"):
        load(folder)


def test_a_diverged_run_has_no_final_weights(workdir, folder):
    (record,) = read_records(workdir)
    write_record(folder, dataclasses.replace(record, status="diverged", diverged_step=7))
    with pytest.raises(InputError, match=r"= 'diverged': .* diverged at step 7"):
        load(folder)


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_an_earlier_checkpoint_does_not_stand_for_the_last_one(
    workdir, folder, tiny_data_dir, harm
):
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "30", checkpoints / "20")
    if harm == "damaged":
        path = next(p for p in sorted((checkpoints / "30" / "state").rglob("*")) if p.is_file())
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        shutil.rmtree(checkpoints / "30")
    spec = choose(workdir, None).specs[0]
    lost = r"checkpoints/30 = 'damaged or missing'.*final weights"
    with pytest.raises(InputError, match=lost):
        load(folder)
    with pytest.raises(InputError, match=lost):
        open_run(spec, workdir=workdir, data_dir=tiny_data_dir)


def test_a_checkpoint_that_vanishes_while_it_is_read_is_named(folder, monkeypatch):
    from modjax.training import base_weights as base

    def vanish(checkpoint, *arguments):
        shutil.rmtree(checkpoint / "state")
        return read(checkpoint, *arguments)

    read = base.read_checkpoint
    monkeypatch.setattr(base, "read_checkpoint", vanish)
    with pytest.raises(InputError, match=r"checkpoints/30 = 'damaged or missing'"):
        load(folder)


def test_a_copy_of_a_run_is_no_run_and_every_reader_names_it(
    workdir, folder, tiny_data_dir, caplog, capsys
):
    copy = folder.with_name(f"{folder.name}.bak")
    shutil.copytree(folder, copy)
    link = folder.with_name("best")
    link.symlink_to(folder)
    found = scan(workdir)
    assert [record.run_id for record in found.records] == [folder.name]
    assert set(found.left_out) == {copy.name, link.name}
    said = f"{copy.name}/result.json = '{folder.name}': must be {copy.name}"
    assert said in found.left_out[copy.name]

    assert choose(workdir, None).specs[0].run_id == folder.name
    plan = ["plan", f"--config={TINY}", f"--data-dir={tiny_data_dir}"]
    for verb in (["status"], ["fit"], ["report"], plan):
        caplog.clear()
        code = 2 if verb is plan else 0  # whose data is not prepared
        assert main([*verb, f"--workdir={workdir}"]) == code
        (best, bak) = sorted(caplog.messages)
        assert "runs/best/" in best and copy.name in bak, verb
    with pytest.raises(InputError, match=rf"--run = '{copy.name}'"):
        choose(workdir, copy.name)
    with pytest.raises(InputError, match=rf"must be {copy.name}"):
        load(copy)
    load(link)  # its folder is the run's own


def test_a_folder_that_holds_another_planned_runs_result_is_no_result(workdir, folder, capsys):
    """After `cp -r runs/A runs/B`, run B is not done."""
    other = folder.with_name("mod-1e9-d8-l2-00000000")
    shutil.copytree(folder, other)
    plan = json.loads((workdir / "plan.json").read_text())
    write_json(workdir / "plan.json", plan | {"runs": [folder.name, other.name]})
    capsys.readouterr()
    assert main(["status", f"--workdir={workdir}", "--json"]) == 0
    states = {run["run_id"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states[folder.name]["state"] == "done"
    assert states[other.name]["state"] == "damaged"
    (other / "result.json").unlink()
    main(["status", f"--workdir={workdir}", "--json"])
    states = {run["run_id"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states[other.name]["state"] == "damaged" and folder.name in states[other.name]["why"]
