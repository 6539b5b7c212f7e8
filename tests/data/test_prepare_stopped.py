"""Preparing that is killed, fills the disk, or uploads its cache. These tests load TensorFlow."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modjax.cli.main import main
from modjax.data.prepare.prepare import prepare
from modjax.data.token_cache import list_caches, open_cache
from modjax.errors import InputError

pytestmark = pytest.mark.usefixtures("tensorflow")
COMMAND = """
import sys
from pathlib import Path
from modjax.errors import InputError
from modjax.data.prepare.prepare import prepare
try:
    prepare(text_files=[Path(sys.argv[1])], name="big", data_dir=Path(sys.argv[2]))
except InputError as error:
    sys.exit(f"modjax: {error}")
"""


@pytest.fixture(scope="module")
def big_file(tmp_path_factory) -> Path:
    """A file of 12 million characters, which fill several files of the cache."""
    letters = np.random.default_rng(0).integers(97, 123, (6000, 2000), np.uint8)
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    path.write_text("".join(f'{{"text": "{bytes(row).decode()}"}}\n' for row in letters))
    return path


@pytest.mark.slow
def test_killed_and_run_again_it_goes_on_and_ends_in_the_same_cache(big_file, tmp_path):
    reference = prepare(text_files=[big_file], name="big", data_dir=tmp_path / "whole")
    data_dir = tmp_path / "killed"
    command = [sys.executable, "-c", COMMAND, str(big_file), str(data_dir)]
    journal = data_dir / ".big-bytes.partial" / "journal.json"

    def tokens_kept() -> int:
        if not journal.exists():
            return 0
        return json.loads(journal.read_text())["splits"]["train"]["tokens"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not tokens_kept() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert tokens_kept() > 0
    assert list_caches(data_dir) == []
    with pytest.raises(InputError, match="no token cache here"):
        open_cache(data_dir / "big-bytes")

    first_shard = data_dir / ".big-bytes.partial" / "train" / "c" / "0"
    when = first_shard.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    manifest = open_cache(data_dir / "big-bytes").manifest
    assert manifest == open_cache(reference).manifest
    first_shard = data_dir / "big-bytes" / manifest.folder / "train" / "c" / "0"
    assert first_shard.stat().st_mtime_ns == when
    assert [path.name for path in data_dir.iterdir()] == ["big-bytes"]
    # Nothing but our own lines: TensorFlow, absl and TFDS are silent.
    assert again.stdout == ""
    assert again.stderr and all(line.startswith("modjax: ") for line in again.stderr.splitlines())


def test_a_full_disk_ends_in_one_line_and_leaves_no_cache(big_file, tmp_path):
    script = f'mount -t tmpfs -o size=2M tmpfs "{tmp_path}" && "$@"; echo $?; ls -A "{tmp_path}"'
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    allowed = shutil.which("unshare") and subprocess.run([*enter, "true"], capture_output=True)
    if not allowed or allowed.stdout != b"0\n":
        pytest.skip("needs permission to mount a small file system")
    command = [sys.executable, "-c", COMMAND, str(big_file), str(tmp_path)]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1\n"  # the exit status, and then no file at all
    refusals = [line for line in done.stderr.splitlines() if "--data-dir" in line]
    assert len(refusals) == 1 and "no space left on the disk" in refusals[0]
    assert "Traceback" not in done.stderr


def modjax(capsys, *arguments: object) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of `modjax data arguments...`"""
    code = main(["data", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_cache_is_prepared_into_an_object_store(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name, texts in {"a": "one two three", "b": "four five"}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts.split()]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def prepared(name: str, *options: str) -> tuple[int, str, str]:
        text = f"--text={tmp_path / name}.jsonl"
        return modjax(capsys, "prepare", "--data-dir=gs://bucket/data", text, *options)

    assert prepared("a")[:2] == (0, "gs://bucket/data/text-bytes\n")
    here = prepare(text_files=[tmp_path / "a.jsonl"], data_dir=tmp_path / "local")
    assert open_cache("gs://bucket/data/text-bytes").manifest == open_cache(here).manifest
    a = open_cache(here).manifest
    for path in filter(Path.is_file, here.rglob("*")):
        assert bucket.objects[f"data/text-bytes/{path.relative_to(here)}"] == path.read_bytes()
    assert not any(path.is_file() for path in (tmp_path / "caches").rglob("*"))
    code, out, _ = modjax(capsys, "show", "--data-dir=gs://bucket/data", "--json")
    assert code == 0 and [manifest["name"] for manifest in json.loads(out)] == ["text"]

    stores = len(bucket.requests)
    assert prepared("a")[:2] == (0, "gs://bucket/data/text-bytes\n")
    assert len(bucket.requests) == stores, "it is there already"
    code, _, err = prepared("b")
    assert code == 2 and "gs://bucket/data/text-bytes was prepared from other input" in err
    bucket.refuse.add("data/text-bytes/manifest.json")
    code, _, err = prepared("b", "--force")
    assert code == 2 and "cannot be written: PERMISSION_DENIED" in err.splitlines()[-1]
    assert list_caches("gs://bucket/data") == [a], "the old cache stays until the new one is whole"
    bucket.refuse.clear()
    bucket.requests.clear()
    assert prepared("b", "--force")[0] == 0
    stored = [name for method, name in bucket.requests if method == "POST"]
    expected = ["data/text-bytes/.modjax", "data/text-bytes/manifest.json"]
    assert stored == expected, "the files are not uploaded again"
    (manifest,) = list_caches("gs://bucket/data")
    assert sum(split.documents for split in manifest.splits.values()) == 2


def test_a_store_without_permission_is_refused_before_anything_is_read(bucket, tmp_path):
    bucket.refuse.add("data/stdlib-bytes/.modjax")
    with pytest.raises(InputError, match="--data-dir = 'gs://bucket/data/stdlib-bytes': cannot be"):
        prepare(data_dir="gs://bucket/data")


def test_a_file_url_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    path = prepare(text_files=[tmp_path / "a.jsonl"], data_dir=f"file://{tmp_path}/data")
    assert path == f"file://{tmp_path}/data/text-bytes"
    assert open_cache(tmp_path / "data" / "text-bytes").manifest == open_cache(path).manifest
