"""Unexpected errors are one line, and lost output changes no exit code."""

import errno
import io
import os
import subprocess
import sys
import tempfile

import pytest

from modjax import faults
from modjax.cli import verbs
from modjax.cli.main import lasting
from tests.cli.test_cli import CONFIGS, TINY, said

STATUS = ["status", "--workdir=somewhere"]
SWEEP = ["sweep", TINY, "--workdir=somewhere"]


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.fixture
def raising(monkeypatch):
    """Makes the verbs `status` and `sweep` raise an error."""

    def raising(error: BaseException) -> None:
        def verb(args):
            raise error

        for name in ("status", "sweep"):
            monkeypatch.setattr(verbs, name, verb)

    return raising


UNFORESEEN = {
    "ValueError: a\\x1b[31m b": ValueError("a\x1b[31m\n b"),
    "KeyError: 'x'": KeyError("x"),
    "RecursionError": RecursionError(),
    "SystemExit: 0": SystemExit(0),  # as from an import
    "SystemExit": SystemExit(),
    "GeneratorExit": GeneratorExit(),
    "MuteError: its message cannot be shown": MuteError(),
    "OSError: [Errno 22] Invalid argument": OSError(errno.EINVAL, "Invalid argument"),
}


@pytest.mark.parametrize("words", UNFORESEEN)
def test_a_fault_is_one_line_with_its_traceback_in_a_file(
    words, raising, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raising(UNFORESEEN[words])
    code, out, err = said(capsys, *STATUS)
    assert (code, out) == (70, "")
    (kept,) = tmp_path.iterdir()
    line = f"modjax: a fault of modjax, not of your input: {words}; please report it with {kept}"
    assert err == f"{line}\n"
    text = kept.read_text()
    assert text.startswith("modjax status --workdir=somewhere\nmodjax 0.")
    assert "in verb\n    raise error\n" in text


def test_a_traceback_that_no_file_takes_is_printed(raising, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    raising(KeyError("x"))
    code, _, err = said(capsys, *SWEEP)
    assert code == 70 and "in verb\n    raise error\nKeyError: 'x'\n" in err
    last = "please report it with the traceback above; what is finished is kept"
    assert err.splitlines()[-1].endswith(last)


OUTSIDE = {
    "somewhere: no space left: free some": OSError(errno.ENOSPC, "No space left"),
    "file: Permission denied": PermissionError(errno.EACCES, "Permission denied", "file"),
    "a\\nb: No such file": FileNotFoundError(errno.ENOENT, "No such file", "a\nb"),
    "somewhere: Too many open files": OSError(errno.EMFILE, "Too many open files"),
    "out of memory: MemoryError": MemoryError(),
    "out of memory: RuntimeError: RESOURCE": RuntimeError("RESOURCE_EXHAUSTED: Out of memory a"),
    "out of memory: ValueError: RESOURCE": ValueError("RESOURCE_EXHAUSTED: Ran out of memory on H"),
}


def test_a_machine_without_files_is_named_where_nothing_else_can_be():
    error = OSError(errno.EMFILE, "Too many open files")
    assert faults.machine_error_line(error) == "this machine: Too many open files"


@pytest.mark.parametrize("words", OUTSIDE)
def test_what_the_machine_refuses_is_one_line_that_names_the_file(words, raising, capsys):
    raising(OUTSIDE[words])
    code, out, err = said(capsys, *SWEEP)
    assert (code, out) == (2, "")
    assert err.startswith(f"modjax: {words}".replace("\\n", " ")) and err.count("\n") == 1
    assert err.endswith("; what is finished is kept\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", TINY, "--workdir=a", "--workdir=b"], "argument --workdir: given twice"),
        (["plan", TINY, "--jobs", "1", "--jobs=1"], "argument --jobs: given twice"),
        (["plan", TINY, TINY], "argument --config: given twice"),
        (["plan", TINY, "--config.train.b2=0.9", "--config.train.b2", "0.9"], "train.b2: given tw"),
        (["data", "prepare", "--text", "a", "--text", "b"], "argument --text: given twice"),
    ],
)
def test_an_option_is_given_once(arguments, words, capsys):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_some_options_may_be_given_again(capsys):
    arguments = [
        "sample",
        "--workdir=none",
        "--prompt=x",
        "--stop=a",
        "--stop=b",
        "--json",
        "--json",
    ]
    assert "holds no finished run" in said(capsys, *arguments)[2]


class Broken(io.StringIO):
    """A stream that fails from the second write on."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_output_that_fails_is_dropped_and_remembered(monkeypatch):
    out, err = Broken(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting() as lost:
        print("one")
        print("two")
        print("three", file=sys.stderr)
    assert isinstance(lost.lost, OSError) and lost.lost.errno == errno.ENOSPC
    assert (out.getvalue(), err.getvalue()) == ("one", "three\n")
    assert sys.stdout is out and sys.stderr is err


FLOPS = ["flops", f"--config={CONFIGS / 'single.py'}"]
PLAN = ["plan", TINY, "--data-dir=none", "--jobs=0"]
LOST = "modjax: standard output: No space left on device: what was printed is lost\n"


@pytest.mark.parametrize(
    ("arguments", "streams", "code", "words"),
    [
        (FLOPS, ">&-", 0, ""),
        (FLOPS, "2>&-", 0, None),
        (FLOPS, ">&- 2>&- <&-", 0, ""),
        (FLOPS, ">/dev/full", 2, LOST),
        (["--help"], ">/dev/full", 2, LOST),
        (["sweep", "--help"], ">/dev/full", 2, LOST),
        (["--version"], ">/dev/full", 2, LOST),
        (["--version"], "| true; exit ${PIPESTATUS[0]}", 0, ""),
        (FLOPS, "| true; exit ${PIPESTATUS[0]}", 0, ""),
        (PLAN, "2>/dev/full", 2, ""),
        (PLAN, ">&- 2>&-", 2, ""),
        (PLAN, "2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
    ],
)
def test_streams_that_are_closed_full_or_gone_change_no_exit_code(arguments, streams, code, words):
    command = f'"$@" {streams}'
    modjax = [sys.executable, "-P", "-m", "modjax.cli", *arguments]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *modjax],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent)},
    )
    assert done.returncode == code
    assert done.stderr == (words or "")
    assert (done.stdout != "") == (words is None)


def test_a_closed_stream_is_no_name_for_the_next_file(tmp_path):
    """Otherwise printed text would end up in a file of the sweep."""
    script = f"""
import os, sys
from modjax.cli.main import lasting
with lasting():
    number = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT)
    print("into nothing")
sys.exit(number < 3)
"""
    (tmp_path / "script.py").write_text(script)
    command = f"exec {sys.executable} {tmp_path / 'script.py'} >&- 2>&- <&-"
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_letters_outside_the_alphabet_of_the_terminal_are_escaped(capsys, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with lasting():
        print("ü\udc80")
        sys.stdout.flush()
    assert raw.getvalue() == b"\\xfc\\udc80\n"


def test_help_and_readme_say_what_exit_codes_mean(capsys):
    text = " ".join(said(capsys, "--help")[1].split())
    assert "70 a fault of modjax" in text and "2 bad input" in text
    readme = (CONFIGS.parent / "README.md").read_text()
    assert "70 means a fault of modjax" in " ".join(readme.split())
