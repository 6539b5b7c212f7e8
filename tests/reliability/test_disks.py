"""Full disks and read-only disks, on file systems made for the tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.reliability.small import assert_same_bytes, files, finish

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """Returns disk(*options), which remounts a file system in memory and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=64m"):
        pytest.skip("needs the right to mount a file system")

    def change(*options: str) -> Path:
        assert mount("remount", *options)
        return folder

    yield change
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [16, 100, 300, 600, 1000])
def test_a_full_disk_is_one_line_and_loses_nothing(sweep, undisturbed, disk, kilobytes, count):
    folder = disk(f"size={kilobytes}k")
    process = sweep(folder / "work")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("modjax: ") and "no space left: free some" in last
    assert "Traceback" not in err
    before = files(folder / "work", "result.json")
    disk("size=64m")
    finish(sweep(folder / "work"))
    assert before.items() <= files(folder / "work", "result.json").items()
    assert_same_bytes(folder / "work", undisturbed)
    count("full disks survived")


def test_a_disk_that_cannot_be_written_is_one_line_and_can_be_looked_at(
    modjax, sweep, undisturbed, disk, count
):
    workdir = disk("rw") / "work"
    shutil.copytree(undisturbed, workdir)
    (min((workdir / "runs").iterdir()) / "result.json").unlink()
    disk("ro")
    for process in (
        sweep(workdir),
        modjax("report", f"--workdir={workdir}"),
        modjax("data", "prepare", f"--data-dir={workdir}/data"),
    ):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2, err
        assert err.count("\n") == 1 and "Read-only file system" in err
        count("writes to a read-only disk refused in one line")
    for verb in ("status", "fit"):
        process = modjax(verb, f"--workdir={workdir}")
        _, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        count("looks at a read-only disk")
