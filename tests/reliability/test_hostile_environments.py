"""Failing streams and machines that refuse give one line, and the right exit code."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.reliability.small import arguments

pytestmark = pytest.mark.slow

SILENT, FULL = ">&- 2>&- <&-", ">/dev/full"
GONE, NOBODY = "| true; exit ${PIPESTATUS[0]}", "2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}"
LOST = "modjax: standard output: No space left on device: what was printed is lost"


@pytest.fixture
def shell(data_dir, tmp_path_factory):
    """Returns shell(command), which runs bash with `modjax` and $DATA defined."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
        python = f"{shlex.quote(sys.executable)} -P -m modjax.cli"
        paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            ["bash", "-c", f'modjax() {{ {python} "$@"; }}; {command}'],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
            | {"PYTHONPATH": paths, "DATA": str(data_dir)}
            | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return shell


VERBS = {
    "status": "status",
    "fit": "fit",
    "report": "report",
    "eval": 'eval --data-dir="$DATA" --routing=predictor',
    "sample": 'sample --data-dir="$DATA" --prompt=abc --tokens=4 --run="$RUN"',
}


@pytest.mark.parametrize("verb", VERBS)
def test_streams_change_no_exit_code_of_a_verb(shell, undisturbed, verb, count):
    (run, *_) = sorted(path.name for path in undisturbed.glob("runs/mod*"))
    command = f"modjax {VERBS[verb]} --workdir={undisturbed}"
    for streams in (SILENT, "2>/dev/full", GONE, NOBODY):
        done = shell(f"{command} {streams}", RUN=run)
        assert (done.returncode, done.stderr) == (0, ""), streams
        count("verbs with streams that fail")
    done = shell(f"{command} {FULL}", RUN=run)
    assert done.stderr == f"{LOST}\n"
    assert done.returncode == (0 if verb == "report" else 2), "a report lies in its file"


@pytest.mark.parametrize("streams", [SILENT, FULL, "2>/dev/full", GONE, NOBODY])
def test_streams_change_no_exit_code_of_a_sweep(shell, data_dir, tmp_path, streams, count):
    more = ["--config.sweep.sizes=1", "--jobs=1"]
    command = shlex.join(["modjax", *arguments(tmp_path / "work", data_dir, *more)])
    done = shell(f"{command} {streams}")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("work/runs/*/result.json"))) == 2
    count("sweeps with streams that fail")


REFUSED = [
    ({"JAX_PLATFORMS": "foo"}, "", "Unable to initialize backend 'foo'"),
    ({"JAX_PLATFORMS": "cuda"}, "", "jax cannot start"),
    ({"XLA_FLAGS": "--nonsense"}, "", "Unknown flag"),
    ({"XLA_FLAGS": "nonsense"}, "", "Could not open file"),
    ({"JAX_NUM_CPU_DEVICES": "x"}, "", "jax cannot start"),
    ({"JAX_ENABLE_X64": "maybe"}, "", "jax cannot start"),
    ({}, "ulimit -v 300000;", "jax cannot start"),
]


@pytest.mark.parametrize(("environment", "limit", "words"), REFUSED)
@pytest.mark.parametrize("verb", ["sweep", "check", "sample"])
def test_an_environment_that_refuses_jax_is_one_line(
    shell, undisturbed, data_dir, tmp_path, environment, limit, words, verb, count
):
    command = VERBS["sample"] + f" --workdir={undisturbed}"
    if verb == "sweep":
        command = shlex.join(arguments(tmp_path / "work", data_dir, "--jobs=1"))
    if verb == "check":
        command = "check --config=configs/tiny.py"
    (run, *_) = sorted(path.name for path in undisturbed.glob("runs/mod*"))
    done = shell(f"{limit} modjax {command}", RUN=run, **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("modjax: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and len(done.stderr) < 2000
    assert not (tmp_path / "work").exists(), "nothing was begun"
    count("environments that refuse jax")


def test_files_that_may_not_grow_are_named(shell, undisturbed, count):
    done = shell(f"ulimit -f 0; modjax report --workdir={undisturbed}")
    assert done.returncode == 2
    kept = "nothing was written, and the old content is kept"
    assert re.fullmatch(rf"modjax: {undisturbed}/\S+: File too large; {kept}\n", done.stderr)
    count("machines that refuse files")


def test_a_display_that_is_not_there_matters_to_no_report(shell, undisturbed, count):
    done = shell(f"modjax report --workdir={undisturbed}", MPLBACKEND="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    count("displays that are not there")
