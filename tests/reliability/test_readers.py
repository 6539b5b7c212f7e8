"""Reading runs and folders while other processes write, delete and rewrite them."""

import contextlib
import json
import shutil
import threading
import time

import pytest

import modjax
from modjax.cli.main import main
from modjax.errors import InputError
from tests.reliability.small import assert_same_bytes, files

pytestmark = pytest.mark.slow


def test_reading_runs_that_are_being_trained_changes_nothing_in_their_end(
    sweep, undisturbed, tmp_path, capsys, count
):
    workdir = tmp_path / "work"
    # A checkpoint is always being written.
    process = sweep(workdir, "--config.execution.checkpoint_seconds=0.02")
    beside_writes = 0
    while process.poll() is None:
        for folder in workdir.glob("runs/*"):
            written = list(folder.glob("checkpoints/*orbax-checkpoint-tmp*"))
            finished = (folder / "result.json").exists()
            with contextlib.suppress(InputError):
                modjax.load(folder)
                assert finished or (folder / "result.json").exists(), "half-trained weights"
            beside_writes += len(written) > 0
        with contextlib.suppress(SystemExit):
            assert main(["status", f"--workdir={workdir}"]) in (0, 2)
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0 and not files(workdir, "failure.json"), err
    assert "once more" not in err
    assert len(json.loads(out)["records"]) == len(files(undisturbed, "result.json"))
    count("loads beside a checkpoint that was being written", beside_writes)
    count("arrays compared bit for bit", assert_same_bytes(workdir, undisturbed))


@pytest.mark.parametrize("verb", ["status", "fit", "report"])
def test_a_folder_that_is_deleted_and_put_back_all_the_time_ends_no_verb_in_a_traceback(
    undisturbed, tmp_path, capsys, count, verb
):
    workdir, over = tmp_path / "work", threading.Event()

    def disturb() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(
                    undisturbed,
                    workdir,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("checkpoints"),
                )
            time.sleep(0.02)
            shutil.rmtree(workdir, ignore_errors=True)

    thread = threading.Thread(target=disturb)
    thread.start()
    codes, deadline = [], time.monotonic() + 15
    try:
        while time.monotonic() < deadline:
            capsys.readouterr()
            codes.append(main([verb, f"--workdir={workdir}"]))
            err = capsys.readouterr().err
            assert codes[-1] in (0, 2), err
            assert all(line.startswith("modjax: ") for line in err.splitlines()), err
    finally:
        over.set()
        thread.join()
    assert len(codes) > 3
    count(f"`{verb}` while its folder was deleted and put back", len(codes))
