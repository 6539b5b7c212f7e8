"""A worker sets jax's settings, whatever its environment and the user's imports say."""

import os
from pathlib import Path

import pytest

from tests.scaling.workers.worker_messages import settings, worker_says

JOB = """
import jax
import jax.numpy as jnp
from modjax.errors import InputError
from modjax.provenance import provenance
from modjax.specs import ModelSpec

def check(specs, execution, **where):
    model = ModelSpec(vocab_size=256, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, d_ff=8)
    found = provenance(model, jax.make_mesh((1,), ("data",)))
    drawn = jax.random.normal(jax.random.key(7), (3,)).tolist()
    product = jnp.sum(jnp.arange(3) / 7).dtype.name
    raise InputError("found", {n: v for n, v in found.items() if n.startswith("jax_")},
                     f"{drawn} {product}")
"""
HOSTILE = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_RANDOM_SEED_OFFSET": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_OPTIMIZATION_LEVEL": "O1",
}


def answer(tmp_path: Path, imports: dict[str, str], **environment: str) -> str:
    """Returns the error of the worker's check."""
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    said, errors = worker_says(
        settings(tmp_path, "job", imports), b'{"check": []}\n', **environment
    )
    assert [message["event"] for message in said] == ["ready", "refused"], (said, errors)
    return said[1]["error"]


@pytest.mark.slow
def test_neither_the_environment_nor_an_import_changes_what_is_drawn_or_rounded(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    mine = tmp_path / "mine.py"
    mine.write_text("import jax\njax.config.update('jax_enable_x64', True)")
    plain = answer(tmp_path, {})
    assert "float32" in plain and "'jax_enable_x64': 'False'" in plain
    assert answer(tmp_path, {}, **HOSTILE) == plain
    assert answer(tmp_path, {"mine.py": str(mine)}) == plain


def test_an_import_that_fails_in_a_worker_is_a_fault_in_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit(0)")
    imports = {"mine.py": str(tmp_path / "mine.py")}
    ((said,), _) = worker_says(settings(tmp_path, "json", imports))
    assert said["event"] == "fault"
    assert said["error"] == "model.imports = 'mine.py': cannot be imported: SystemExit: 0"
