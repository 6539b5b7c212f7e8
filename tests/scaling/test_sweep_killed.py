"""A sweep with real training, killed with all its workers in the middle of it."""

import json
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
# Four runs of two layers, a few seconds each: 2 sizes x 2 arms.
OVERRIDES = [
    "sweep.sizes=2", "sweep.budgets=1e10", "sweep.optimum.budget=1e10", "sweep.optimum.params=6e3",
    "sweep.shape.layer_multiple=2", "sweep.recipe.batch_size=4", "train.seq_len=32",
    "train.eval_sequences=8", "execution.log_every=10", "execution.checkpoint_seconds=0.3",
]  # fmt: skip


@pytest.fixture
def sweep(modjax, data_dir):
    """Starts the sweep in a folder."""

    def start(workdir: Path):
        overrides = [f"--config.{override}" for override in OVERRIDES]
        where = [f"--workdir={workdir}", f"--data-dir={data_dir}"]
        return modjax("sweep", f"--config={CONFIG}", *where, *overrides, "--jobs=2", "--json")

    return start


def finish(process) -> list[dict]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)["records"]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def kill_all(process) -> None:
    """SIGKILL to the sweep and its workers, which are in sessions of their own."""
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(workdir: Path, name: str) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workdir.glob(f"runs/*/{name}")}


def final_state(run_dir: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint: parameters, optimizer, counters."""
    newest = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((run_dir / "checkpoints" / str(newest) / "state").absolute())
    return [np.asarray(array) for array in jax.tree.leaves(state)]


@pytest.mark.slow
def test_killed_with_its_workers_a_sweep_ends_in_the_same_bytes(sweep, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    expected = finish(sweep(undisturbed))
    assert len(expected) == 4
    lines = sum(text.count(b"\n") for text in files(undisturbed, "metrics.jsonl").values())

    rng = random.Random(0)
    for share in (rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.8)):
        process = sweep(killed)
        deadline = time.monotonic() + 120
        while sum(t.count(b"\n") for t in files(killed, "metrics.jsonl").values()) < share * lines:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        kill_all(process)
        begun, done = files(killed, "metrics.jsonl"), files(killed, "result.json")
        assert set(begun) - set(done), "killed in the middle of a run"

    before = {name: files(killed, name) for name in ("result.json", "metrics.jsonl")}
    records = finish(sweep(killed))
    assert [r["run_id"] for r in records] == [r["run_id"] for r in expected]
    assert set(files(killed, "result.json")) == {r["run_id"] for r in expected}
    for run_id, result in before["result.json"].items():
        assert files(killed, "result.json")[run_id] == result, "a finished run is not repeated"
    assert not files(killed, "failure.json")
    assert files(killed, "metrics.jsonl") == files(undisturbed, "metrics.jsonl")
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["status"] == "finished" and ours["eval_loss"] == theirs["eval_loss"]
        states = [final_state(d / "runs" / ours["run_id"]) for d in (killed, undisturbed)]
        for a, b in zip(*states, strict=True):
            assert a.tobytes() == b.tobytes()
