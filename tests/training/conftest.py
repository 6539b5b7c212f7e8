"""Compilation cache that the tests and their child processes share, and runs to kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.training.killed import KILLED


@pytest.fixture(scope="session", autouse=True)
def child_environment(tmp_path_factory) -> dict[str, str]:
    """Returns the environment of child processes, with this process's compilation cache."""
    folder = str(tmp_path_factory.mktemp("xla"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture
def start(child_environment, tiny_data_dir):
    """A function that starts a training process in a folder."""
    processes = []

    def start(run_dir: Path | str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.training.child"]
        process = subprocess.Popen(
            [*command, str(run_dir), str(tiny_data_dir), json.dumps(KILLED)],
            env=child_environment | environment,
            cwd=Path(__file__).parents[2],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def undisturbed(child_environment, tiny_data_dir, tmp_path_factory):
    """The folder of the same run, which was never stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.training.child",
            str(run_dir),
            str(tiny_data_dir),
            json.dumps(KILLED),
        ],
        env=child_environment,
        cwd=Path(__file__).parents[2],
        check=True,
        stdout=subprocess.PIPE,
    )
    return run_dir
