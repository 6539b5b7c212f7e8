"""8 fake devices, strict numerics, and a tiny real token cache that needs no TensorFlow."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from modjax.bucket import _seen, _store, local
from modjax.data.manifest import Manifest, Split
from modjax.data.prepare.writer import Written, write_split
from modjax.data.token_cache import cache_dir
from modjax.specs import DataConfig, Predictor
from modjax.specs.imports import IMPORTED
from modjax.specs.layer import NAMES, ORIGINS
from tests.bucket import Bucket

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Modules of the standard library, as bytes shifted by 3; 1 ends a document.
SOURCES = {"train": ("argparse", "ast", "inspect"), "validation": ("enum", "typing")}
TINY_DATA = DataConfig(name="tiny")


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory) -> Path:
    """Returns a data folder with the corpus of TINY_DATA."""
    data_dir = tmp_path_factory.mktemp("data")
    folder = cache_dir(data_dir, TINY_DATA)
    splits = {}
    for split, modules in SOURCES.items():
        texts = [Path(__import__(module).__file__).read_bytes() for module in modules]
        documents = [
            (np.append(np.frombuffer(text, np.uint8).astype(np.uint16) + 3, 1), len(text))
            for text in texts
        ]
        array = folder / "tiny-1" / split  # the cache's folder is named by its fingerprint
        array.mkdir(parents=True)
        *_, written = write_split(array, documents, np.dtype(np.uint16), Written())
        splits[split] = Split(written.documents, written.tokens, written.bytes)
    manifest = Manifest(
        name="tiny",
        vocab="bytes",
        vocab_size=259,
        eos_id=1,
        source="standard library",
        fingerprint="tiny-1",
        splits=splits,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return data_dir


@pytest.fixture(scope="session")
def finished_workdir(tiny_data_dir, tmp_path_factory) -> Path:
    """Returns a sweep's folder with one finished run on TINY_DATA, with a predictor."""
    from modjax.records import run_dir
    from modjax.specs import Dense, Execution, MoD
    from modjax.training.loop import train
    from tests.training.tiny import run_spec

    workdir = tmp_path_factory.mktemp("finished")
    spec = run_spec(layers=(Dense(), MoD(capacity=0.25, causal=Predictor())), steps=30)
    jax.config.update("jax_disable_most_optimizations", True)
    train(spec, Execution(data=1), run_dir=run_dir(workdir, spec.run_id), data_dir=tiny_data_dir)
    jax.config.update("jax_disable_most_optimizations", False)
    return workdir


@pytest.fixture
def own_layers():
    """Undoes what a test registers and imports, so that the next may use the same names."""
    tables = (NAMES, ORIGINS, IMPORTED)
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    for name in [name for name in sys.modules if name.startswith(("modjax_imports_", "own_"))]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Returns a data folder with two million random letters, as `modjax data prepare` writes it."""
    folder = tmp_path_factory.mktemp("data")
    path = cache_dir(folder, DataConfig())
    rng = np.random.default_rng(0)
    splits = {}
    for split, tokens in (("train", 2_000_000), ("validation", 100_000)):
        array = path / "f00" / split
        array.mkdir(parents=True)
        text = rng.integers(3, 30, tokens).astype(np.uint16)
        documents = [(text, tokens)]
        *_, written = write_split(array, documents, np.dtype(np.uint16), Written())
        splits[split] = Split(written.documents, written.tokens, written.bytes)
    manifest = Manifest("stdlib", "bytes", 259, 1, "random", "f00", splits)
    (path / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.fixture
def bucket(monkeypatch):
    """An object store at gs://bucket, for this process and those that it starts."""
    bucket = Bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    _store.cache_clear()
    yield bucket
    bucket.close()


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes this process, and those that it starts, a machine of that name.

    Returns its copy of gs://bucket/w.
    """

    def be(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        _seen.clear()
        return local("gs://bucket/w")

    be("first")
    return be


@pytest.fixture
def modjax(tmp_path_factory):
    """Starts `modjax ARGUMENTS...` in a process group of its own, which ends with the test."""
    started = []
    cache = tmp_path_factory.getbasetemp() / "cache"  # its compiled programs stay out of the user's

    def start(*arguments: object, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "modjax.cli", *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
