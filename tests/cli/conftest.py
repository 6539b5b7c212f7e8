"""`modjax` in this process, and folders with finished runs."""

import dataclasses
import os
import shutil

import jax
import pytest

from modjax.cli.main import main
from modjax.provenance import SETTINGS
from modjax.records import read_records, run_dir, write_record, write_spec
from modjax.specs import Dense, MoD
from tests.training.tiny import run_spec


@pytest.fixture(scope="module")
def quick_compiles():
    """Compiles the programs of a module's tests without most optimizations."""
    kept = dict(os.environ)  # the verbs set where JAX caches programs
    jax.config.update("jax_disable_most_optimizations", True)
    fixed = SETTINGS.pop("jax_disable_most_optimizations")
    yield
    SETTINGS["jax_disable_most_optimizations"] = fixed
    os.environ.clear()
    os.environ.update(kept)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def where(finished_workdir, tiny_data_dir):
    return [f"--workdir={finished_workdir}", f"--data-dir={tiny_data_dir}"]


@pytest.fixture(scope="module")
def two_runs(finished_workdir, tmp_path_factory):
    """Returns a sweep's folder and its two runs: the finished one, and one without a predictor."""
    workdir = tmp_path_factory.mktemp("two") / "work"
    shutil.copytree(finished_workdir, workdir)
    (record,) = read_records(workdir)
    spec = run_spec(layers=(Dense(), MoD(capacity=0.25)))
    return workdir, record.run_id, add_run(workdir, record, spec)


def add_run(workdir, record, spec, **changes) -> str:
    """Adds a run without a checkpoint, whose record is `record` with `changes`; returns its id."""
    folder = run_dir(workdir, spec.run_id)
    folder.mkdir()
    write_spec(folder, spec)
    write_record(folder, dataclasses.replace(record, run_id=spec.run_id, **changes))
    return spec.run_id


@pytest.fixture
def said(capsys):
    """Returns the exit code, stdout and stderr of `modjax ARGUMENTS...`."""

    def said(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return said
