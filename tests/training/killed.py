"""A run of about 2 s for tests to kill, see child.py, and comparisons with one that was not."""

import subprocess
from pathlib import Path

import jax
import numpy as np

from modjax.records import read_record
from modjax.specs import Execution
from modjax.training.checkpoint import Checkpoints
from modjax.training.mesh import make_mesh
from modjax.training.state import abstract_model, abstract_state
from tests.training.tiny import run_spec

ONE_DEVICE = Execution(data=1)
KILLED = {"steps": 60, "eval_every": 14}


def wait_for(process: subprocess.Popen, step: int) -> None:
    """Waits until the process has printed a step at or after `step`."""
    for line in process.stdout:
        if int(line.split()[1]) >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def final_state(run_dir: Path):
    spec = run_spec(**KILLED)
    split = abstract_model(spec.model)
    identity = {"run_id": spec.run_id, "data_fingerprint": "tiny-1"}
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2, identity=identity)
    state, _ = checkpoints.restore(abstract_state(make_mesh(ONE_DEVICE), split, spec.train))
    checkpoints.close()
    return state


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    ours, expected = final_state(run_dir), final_state(undisturbed)
    assert int(expected.step) == KILLED["steps"]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    metrics = (undisturbed / "metrics.jsonl").read_bytes()
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    ours, expected = read_record(run_dir), read_record(undisturbed)
    assert ours.eval_loss == expected.eval_loss
    assert ours.train_loss == expected.train_loss
