"""A sweep of four real runs of a few seconds each, and checks of its folder."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
RUNS = 4  # 2 sizes x 2 arms, of two layers
OVERRIDES = [
    "sweep.sizes=2",
    "sweep.budgets=3e9",
    "sweep.optimum.budget=3e9",
    "sweep.optimum.params=6e3",
    "sweep.shape.layer_multiple=2",
    "sweep.recipe.batch_size=4",
    "train.seq_len=32",
    "train.eval_sequences=8",
    "execution.log_every=10",
    "execution.checkpoint_seconds=0.3",
]


def arguments(workdir: Path, data_dir: Path, *more: str) -> list[str]:
    """Returns the arguments of `modjax` for the sweep in `workdir`; `more` replaces others."""
    overrides = [f"--config.{override}" for override in OVERRIDES]
    options = [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--data-dir={data_dir}",
        *overrides,
        "--jobs=2",
        "--json",
        *more,
    ]
    return ["sweep", *{option.partition("=")[0]: option for option in options}.values()]


def finish(process) -> list[dict]:
    out, err = process.communicate(timeout=300)
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


def kill_all(process) -> int:
    """Sends SIGKILL to the sweep and its workers, each in its own session; returns their number."""
    victims = [process.pid, *children(process.pid)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in victims[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return len(victims)


def files(workdir: Path, name: str) -> dict[str, bytes]:
    """Returns the content of a file, by the run that has it."""
    found = workdir.glob(f"runs/*/{name}")
    return {path.parent.name: path.read_bytes() for path in found if path.is_file()}


def final_state(run_dir: Path) -> list[np.ndarray]:
    """Returns every array of the newest checkpoint: parameters, optimizer, counters."""
    newest = max(int(path.name) for path in (run_dir / "checkpoints").glob("[0-9]*"))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((run_dir / "checkpoints" / str(newest) / "state").absolute())
    return [np.asarray(array) for array in jax.tree.leaves(state)]


def losses(workdir: Path) -> dict[str, float]:
    results = files(workdir, "result.json")
    return {run_id: json.loads(text)["eval_loss"] for run_id, text in results.items()}


def assert_same_bytes(workdir: Path, undisturbed: Path) -> int:
    """Compares all metric lines, arrays and losses; returns the number of compared arrays."""
    assert files(workdir, "metrics.jsonl") == files(undisturbed, "metrics.jsonl")
    assert losses(workdir) == losses(undisturbed) and len(losses(workdir)) == RUNS
    compared = 0
    for run_id in losses(undisturbed):
        states = [final_state(folder / "runs" / run_id) for folder in (workdir, undisturbed)]
        for ours, theirs in zip(*states, strict=True):
            assert ours.tobytes() == theirs.tobytes()
            compared += 1
    return compared
