"""Sweeps whose folder is in an object store, by machines that share nothing else."""

import json
from pathlib import Path

import pytest

from modjax import bucket as stores
from modjax.bucket import local, open_copy
from modjax.scaling.status import status
from tests.scaling.small_sweep import run_ids, start

URL = "gs://bucket/w"
SECONDS = 0.4


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """Makes this process, and those that it starts, a machine of that name. Returns its copy."""

    def be(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        stores._seen.clear()
        return local(URL)

    be("first")
    return be


def of_run(bucket, name: str) -> dict[str, bytes]:
    """Returns the content of a file in the bucket by the run that has it."""
    found = {i: bucket.objects.get(f"w/runs/{i}/{name}") for i in run_ids()}
    return {run_id: content for run_id, content in found.items() if content is not None}


def test_two_machines_do_each_run_once(bucket, machine, folders):
    (folders[1] / "seconds").write_text("0.5")
    copies, launchers = [], []
    for name in ("first", "second"):
        copies.append(machine(name))
        launchers.append(start((URL, folders[1]), lease=2.0))
    for launcher in launchers:
        output, errors = launcher.communicate(timeout=120)
        assert output.split() == [b"6", b"0"], errors.decode()
    finishes = [path for copy in copies for path in copy.glob("runs/*/finishes")]
    assert sorted(path.parent.name for path in finishes) == sorted(run_ids())
    assert len({path.parents[2] for path in finishes}) == 2, "both had a part"
    assert set(of_run(bucket, "result.json")) == set(run_ids())
    sessions = json.loads(bucket.objects["w/sweep.json"])
    assert sorted(i for session in sessions for i in session["finished"]) == sorted(run_ids())
    found = status(open_copy(URL, writes=False))
    assert found.count("done") == 6
