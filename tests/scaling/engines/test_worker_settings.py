"""A worker sets jax's settings, whatever its environment and the user's imports say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    "JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_RANDOM_SEED_OFFSET": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_OPTIMIZATION_LEVEL": "O1",
}  # fmt: skip


def answer(tmp_path: Path, imports: dict[str, str], **environment: str) -> str:
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"cpus": [], "job": "job", "workdir": str(tmp_path), "fingerprint": "f",
                "data_dir": str(tmp_path), "execution": {}, "imports": imports, "code": {},
                "other_code": False}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "modjax.scaling.engines.worker"], timeout=120, capture_output=True,
        input="".join(json.dumps(line) + "\n" for line in (settings, {"check": []})).encode(),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [message["event"] for message in said] == ["ready", "refused"], (said, done.stderr)
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
    settings = {"cpus": [], "job": "json", "workdir": "w", "fingerprint": "f", "data_dir": "d",
                "execution": {}, "imports": {"mine.py": str(tmp_path / "mine.py")}, "code": {},
                "other_code": False}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "modjax.scaling.engines.worker"], timeout=60, capture_output=True,
        input=json.dumps(settings).encode() + b"\n",
    )  # fmt: skip
    (said,) = map(json.loads, done.stdout.splitlines())
    assert said["event"] == "fault"
    assert said["error"] == "model.imports = 'mine.py': cannot be imported: SystemExit: 0"
