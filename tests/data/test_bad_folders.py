"""Folders that cannot be used: `data prepare` and `data show` name each in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modjax.cli.main import main

DEEP = b'{"a":' * 10**5


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return path


def said(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["data", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("place", "name", "made", "reason"),
    [
        ("file", "x", ["file"], "--data-dir = .*file'.*cannot be made: "),
        ("file/data", "x", ["file"], "--data-dir = .*cannot be made: Not a directory"),
        ("data", "x", ["data/x-bytes"], "--data-dir = .*data'.*cannot be made: File exists"),
        ("data", "x", ["data/.x-bytes.partial"], "--data-dir = .*cannot be written: File exists"),
        ("data", "x" * 250, [], "--name = 'x.*names a folder: must be 1 to 100 bytes"),
        ("data", "ü" * 125, [], "--name = 'ü.*names a folder: must be 1 to 100 bytes"),
        ("a" * 300, "x", [], "File name too long"),
        ("a/" * 3000, "x", [], "File name too long"),
    ],
)
def test_prepare_refuses_a_place_that_cannot_be_one(
    text, tmp_path, capsys, place, name, made, reason
):
    for file in made:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("a file")
    code, out, err = said(
        capsys, "prepare", f"--text={text}", f"--data-dir={tmp_path / place}", f"--name={name}"
    )
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(reason, err), err


NOT_MANIFESTS = {
    "binary": b"\xff\xfe\x00\x01",
    "deep": DEEP,
    "deep-inside": b'{"format": 2, "splits": ' + DEEP,
    "empty": b"",
    "format-1": b'{"format": 1}',
    "list": b"[]",
    "long-number": b'{"format": ' + b"1" * 10**4 + b"}",
    "no-counts": b'{"format": 2, "splits": {"train": 1, "validation": [2]}}',
}


def test_show_lists_what_is_readable_and_names_what_is_not(make_cache, tmp_path, capsys):
    good = make_cache([5, 6, 1], [7, 1], name="good")
    manifest = json.loads((good / "manifest.json").read_text())
    bad = NOT_MANIFESTS | {
        name: json.dumps(manifest | {"fingerprint": value}).encode()
        for name, value in {"elsewhere": "../../etc", "nothing": "", "number": 7}.items()
    }
    for name, content in bad.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(content)
    (tmp_path / "a file").write_text("and no cache")
    code, out, err = said(capsys, "show", f"--data-dir={tmp_path}", "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)] == ["good"]
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for name, line in zip(sorted(bad), lines, strict=True):
        assert line.startswith(f"modjax: data = {str(tmp_path / name)!r}: cannot be read; ")
        assert "modjax data prepare --force" in line and len(line) < 600

    code, out, _ = said(capsys, "show", f"--data-dir={tmp_path}")
    assert code == 0 and len(out.splitlines()) == 3 and "good" in out
    shutil.rmtree(good)
    code, out, err = said(capsys, "show", f"--data-dir={tmp_path}")
    assert (code, out, len(err.splitlines())) == (0, "", len(bad))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "cannot be listed: Not a directory"),
        ("file/data", "cannot be listed: Not a directory"),
        ("a" * 300, "cannot be listed: File name too long"),
    ],
)
def test_show_refuses_what_is_no_folder(tmp_path, capsys, place, reason):
    (tmp_path / "file").write_text("a file")
    code, out, err = said(capsys, "show", f"--data-dir={tmp_path / place}")
    assert (code, out) == (2, "")
    assert err == f"modjax: --data-dir = {str(tmp_path / place)!r}: {reason}\n"


def test_show_of_a_folder_that_is_not_there_finds_nothing(tmp_path, capsys):
    code, out, err = said(capsys, "show", f"--data-dir={tmp_path / 'none'}")
    assert (code, err) == (0, "") and out.startswith("nothing is prepared in ")


def test_read_only_and_forbidden_folders_are_named(make_cache, text, tmp_path):
    """Root drops its rights first, since permissions do not bind it."""
    without = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]
    if os.geteuid() != 0:
        drop = []
    elif subprocess.run([*drop, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to give up the rights of root")

    forbidden_cache = make_cache([5, 6, 1], [7, 1], name="forbidden")
    make_cache([5, 6, 1], [7, 1], name="readable")
    places = {
        "read-only": ("prepare", tmp_path / "read-only", 0o500),
        "forbidden": ("prepare", tmp_path / "forbidden", 0),
        "inside": ("prepare", tmp_path / "part", 0o700),
        "show-forbidden": ("show", tmp_path / "forbidden", 0),
        "show-inside": ("show", tmp_path, 0o700),
    }
    for _, folder, mode in places.values():
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
    (tmp_path / "part" / ".x-bytes.partial").mkdir(mode=0o500)
    forbidden_cache.chmod(0)

    code = "import sys; from modjax.cli.main import main\n"
    for verb, folder, _ in places.values():
        options = [f"--text={text}", "--name=x"] if verb == "prepare" else []
        code += f"print(main({['data', verb, f'--data-dir={folder}', *options]}), flush=True)\n"
        code += "print('--', file=sys.stderr, flush=True)\n"
    done = subprocess.run(
        [*drop, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    errors = done.stderr.split("--\n")[:-1]
    for folder in (tmp_path / "read-only", tmp_path / "forbidden", forbidden_cache):
        folder.chmod(0o700)
    assert [line for line in done.stdout.splitlines() if line.isdecimal()] == list("22220")
    assert [len(error.splitlines()) for error in errors] == [1, 1, 1, 1, 2], errors
    for error, folder in zip(errors, ["read-only", "forbidden", "part", "forbidden"], strict=False):
        assert str(tmp_path / folder) in error and "ermission denied" in error
    assert str(forbidden_cache) in errors[4] and "readable" in done.stdout
