"""In a locale other than UTF-8, files are UTF-8 all the same, and printing never fails."""

import json
import shutil

import pytest

from modjax.cli.main import main
from modjax.records import run_dir, scan

# Without these two, Python itself takes UTF-8 where the locale is C.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def our_encoding_warnings(err):
    """Returns Python's warnings of an `open` in modjax without an encoding."""
    return [line for line in err.splitlines() if "EncodingWarning" in line and "/modjax/" in line]


@pytest.fixture
def workdir(finished_workdir, tmp_path):
    """Copies the sweep with one finished run, and adds a failed run with non-ASCII messages."""
    workdir = tmp_path / "work"
    shutil.copytree(finished_workdir, workdir)
    plan = {
        "command": "modjax sweep --workdir=größe",
        "runs": ["given-up", scan(workdir).records[0].run_id],
    }
    (workdir / "plan.json").write_text(json.dumps(plan, ensure_ascii=False), "utf-8")
    lost = run_dir(workdir, "given-up")
    lost.mkdir()
    (lost / "failure.json").write_text(json.dumps({"why": "größe"}, ensure_ascii=False), "utf-8")
    return workdir


def test_a_report_is_the_same_bytes_whatever_the_locale(modjax, workdir):
    assert main(["report", f"--workdir={workdir}"]) == 0
    expected = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
    assert "±" in expected["report.html"].decode() and "größe" in expected["report.html"].decode()
    process = modjax("report", f"--workdir={workdir}", PYTHONWARNDEFAULTENCODING="1", **ASCII)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == f"{workdir / 'report.html'}\n"
    assert our_encoding_warnings(err) == []
    assert {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()} == expected


@pytest.mark.slow
def test_a_sample_of_other_letters_is_drawn_and_printed_somehow(
    modjax, finished_workdir, tiny_data_dir
):
    arguments = [
        "sample",
        f"--workdir={finished_workdir}",
        f"--data-dir={tiny_data_dir}",
        "--prompt=größe",
        "--tokens=9",
    ]
    out, err = modjax(*arguments, "--json").communicate(timeout=300)
    (expected,) = json.loads(out)
    process = modjax(*arguments, PYTHONWARNDEFAULTENCODING="1", **ASCII)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    text = expected["prompt"] + expected["text"]
    assert out.removesuffix("\n") == text.encode("ascii", "backslashreplace").decode()
    assert our_encoding_warnings(err) == []
