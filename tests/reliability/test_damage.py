"""A damaged file of any kind is survived or named in one line, and never trusted."""

import shutil

import pytest

from modjax.cli.main import main
from tests.reliability.small import RUNS, files, losses

pytestmark = pytest.mark.slow


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16 if data else 16]) + data[middle + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a flipped bit": flip,
    "noise": lambda data: bytes(range(256)) * (1 + len(data) // 256),
    "deep": lambda data: b"[" * 100_000,
    "missing": None,
    "a folder": None,
}
# Files of the sweep or of its first run, whose result stays unless it is the damaged file.
SWEEP_FILES = [
    "plan.json",
    "sweep.json",
    "plan.lock",
    "spec.json",
    "result.json",
    "metrics.jsonl",
    "log.txt",
    "failure.json",
    "lock",
]
CHECKPOINT_FILES = [
    "digest.json",
    "_CHECKPOINT_METADATA",
    "meta/metadata",
    "state/manifest.ocdbt",
    "state/_METADATA",
    "state/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
]
CACHE_FILES = ["manifest.json", "train/zarr.json", "train/c/0", "validation/c/0"]


def damage(path, how) -> None:
    if not path.exists():
        path.write_text("{}")
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


def said(capsys, *arguments) -> tuple[int, str]:
    """Returns the exit code and stderr; an exception would end the test."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    if code == 2:
        assert err.count("\n") == 1 and err.startswith("modjax: "), err
    return code, err


@pytest.mark.parametrize("name", SWEEP_FILES)
def test_a_damaged_file_of_a_sweep_hides_nothing_else(
    sweep, undisturbed, tmp_path, capsys, count, name
):
    for how in DAMAGES:
        workdir = tmp_path / how
        shutil.copytree(undisturbed, workdir)
        first = min((workdir / "runs").iterdir())
        path = first / name if not name.startswith(("plan", "sweep")) else workdir / name
        if name in ("spec.json", "failure.json"):
            (first / "result.json").unlink()  # what it says matters for unfinished runs only
        damage(path, how)
        for verb in ("status", "fit", "report"):
            code, err = said(capsys, verb, f"--workdir={workdir}")
            assert code in (0, 2), (how, verb, code)
            assert code == 0 or (verb, name) == ("status", "plan.json"), (how, err)
        others = {
            run: text
            for run, text in files(undisturbed, "result.json").items()
            if run != first.name
        }
        if how in ("empty", "deep", "a flipped bit"):  # as half or as noise, to a sweep
            shutil.rmtree(workdir)
            count("damaged files of sweeps survived or named")
            continue
        process = sweep(workdir)
        _, err = process.communicate(timeout=200)
        assert process.returncode in (0, 2, 3), (how, err)
        assert "Traceback" not in err
        if process.returncode == 2:
            assert err.count("modjax: ") == 1
        kept = files(workdir, "result.json")
        assert {run: kept[run] for run in others} == others
        shutil.rmtree(workdir)
        count("damaged files of sweeps survived or named")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_as_it_would(
    sweep, undisturbed, tmp_path, count, name
):
    for how in ("half", "a flipped bit", "noise", "missing"):
        workdir = tmp_path / how
        shutil.copytree(undisturbed, workdir)
        first = min((workdir / "runs").iterdir())
        (first / "result.json").unlink()
        steps = sorted((first / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        found = sorted(steps[-1].glob(name))
        if not found:
            pytest.skip(f"this orbax writes no {name}")
        damage(found[0], how)
        process = sweep(workdir)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert losses(workdir) == losses(undisturbed), "what is damaged is not believed"
        shutil.rmtree(workdir)
        count("damaged checkpoints survived")


@pytest.mark.parametrize("name", CACHE_FILES)
def test_a_damaged_token_cache_is_named_or_its_run_is_right(
    sweep, undisturbed, data_dir, tmp_path, count, name
):
    for how in ("half", "a flipped bit", "noise", "missing"):
        damaged = tmp_path / how / "data"
        shutil.copytree(data_dir, damaged)
        (cache,) = damaged.iterdir()
        found = sorted(
            path
            for path in cache.rglob(name.split("/", 1)[-1])
            if name.split("/")[0] in path.parts or "/" not in name
        )
        damage(found[0], how)
        workdir = tmp_path / how / "work"
        process = sweep(workdir, f"--data-dir={damaged}")
        _, err = process.communicate(timeout=200)
        assert "Traceback" not in err
        assert process.returncode in (0, 2), err
        if process.returncode == 0:
            assert losses(workdir) == losses(undisturbed)
            assert len(losses(workdir)) == RUNS
        else:
            assert err.count("modjax: ") == 1 and len(losses(workdir)) < RUNS
        count("damaged token caches survived or named")
