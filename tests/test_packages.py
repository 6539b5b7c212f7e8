"""Packages that are missing, too old or too new are named in one line."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modjax.errors import InputError
from modjax.packages import check_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]


def pins(name: str) -> dict[str, str]:
    lines = (line.split("==") for line in (ROOT / name).read_text().splitlines())
    return {canonicalize_name(package): version for package, version in lines}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Adds the record of a package before all others: name, version, lines of Requires-Dist."""

    def install(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    install("modjax", "9", *PROJECT["dependencies"], 'nonesuch>=1; extra == "data"')
    monkeypatch.syspath_prepend(tmp_path)
    check_packages.cache_clear()
    yield install
    check_packages.cache_clear()


def test_the_packages_that_run_these_tests_are_accepted(installed):
    check_packages()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-3.12.txt"])
def test_every_pinned_set_is_one_that_is_accepted(installed, name):
    pinned = pins(name)
    for needed in NEEDED:
        version = pinned[canonicalize_name(needed.name)]
        assert needed.specifier.contains(version), needed
        installed(needed.name, version)
    check_packages()


@pytest.mark.parametrize("version", ["0.4.38", "0.9", "0.9.99", "0.13", "0.13.0rc1", "1.0.0", "x"])
def test_another_version_is_named_with_what_is_accepted(installed, version):
    installed("jax", version)
    with pytest.raises(InputError) as caught:
        check_packages()
    remedy = "must be installed as >=0.10,<0.13: pip install 'jax>=0.10,<0.13'"
    assert str(caught.value) == f"jax = {version!r}: {remedy}"


@pytest.mark.parametrize("version", ["0.10", "0.10.0", "0.11.2", "0.12.0.1", "0.12.99"])
def test_every_version_within_the_bounds_is_accepted(installed, version):
    installed("jax", version)
    check_packages()


def test_a_missing_package_is_named(installed):
    installed("modjax", "8", "nonesuch>=2")
    (Path(sys.path[0]) / "modjax-9.dist-info" / "METADATA").unlink()
    (Path(sys.path[0]) / "modjax-9.dist-info").rmdir()
    with pytest.raises(
        InputError, match=r"^nonesuch = None: must be installed as >=2: pip install"
    ):
        check_packages()


def test_it_ends_a_command_and_an_import_in_one_line(installed, tmp_path):
    installed("flax", "0.8.0")
    line = "flax = '0.8.0': must be installed as >=0.12.6,<0.13: pip install 'flax>=0.12.6,<0.13'"
    command = "from modjax.cli.main import main; sys.exit(main(['status', '--workdir=none']))"
    for code, expected in {
        command: f"modjax: {line}",
        "import modjax; modjax.MoD; modjax.Transformer": f"modjax.errors.InputError: {line}",
    }.items():
        path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == expected
        assert done.stdout == "" and "jax" not in re.findall(r"site-packages/(\w+)", done.stderr)


INTERPRETER = """#!/bin/sh
case "$1 $2" in
  "-c "*) echo {version} ;;
  "-m venv")
    case "$3" in --clear) rm -rf .venv ;; esac
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/python{version} ;;
  "-m pip") echo "$0 {version} $*" >> log ;;
esac
"""


def test_make_installs_the_set_of_its_python_and_no_environment_serves_another(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-3.12.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def installs(version: str) -> list[str]:
        """Returns the sets of pins that `make install` uses with a stand-in for that Python."""
        python = tmp_path / f"python{version}"
        python.write_text(INTERPRETER.format(version=version))
        python.chmod(0o755)
        (tmp_path / "log").write_text("")
        command = ["make", "--silent", "install", f"PYTHON=./{python.name}"]
        subprocess.run(command, cwd=tmp_path, check=True)
        log = (tmp_path / "log").read_text().splitlines()
        assert all(line.startswith(f".venv/bin/python {version} ") for line in log), log
        return [line.split("--constraint ")[1].split()[0] for line in log]

    assert installs("3.11") == ["constraints.txt"]
    (tmp_path / ".venv" / "installed by hand").touch()
    assert installs("3.11") == [], "it is there"
    assert installs("3.13") == ["constraints-3.12.txt"]
    assert not (tmp_path / ".venv" / "installed by hand").exists(), "made anew"
    assert installs("3.13") == []
    assert installs("3.12") == ["constraints-3.12.txt"]
    assert installs("3.11") == ["constraints.txt"]
    os.utime(tmp_path / "constraints.txt", (2**31, 2**31))
    (tmp_path / ".venv" / "installed by hand").touch()
    assert installs("3.11") == ["constraints.txt"]
    assert (tmp_path / ".venv" / "installed by hand").exists(), (
        "the same Python: brought up to date"
    )
