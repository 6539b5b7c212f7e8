"""Files are written whole or not at all, and reading never waits for an endless one."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.files import is_disk_full, open_file, read_file, read_json, write_atomically
from modjax.records import write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_atomically(path, "old ü")
    assert path.read_bytes() == "old ü".encode()

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_text() == "old ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_known_by_its_number_its_words_and_its_cause():
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(OSError(errno.EDQUOT, "x"))
    assert is_disk_full(ValueError("RESOURCE_EXHAUSTED: write: No space left on device"))
    assert is_disk_full(ValueError("UNKNOWN: Disk quota exceeded [source]"))
    outer = RuntimeError("saving failed")
    outer.__cause__ = OSError(errno.EDQUOT, "x")
    assert is_disk_full(outer)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)


@pytest.fixture(params=["fifo", "/dev/zero", "/dev/tty", "socket", "link to a fifo"])
def endless(request, tmp_path) -> Path:
    """Returns a path whose reading would never end, or would wait for ever."""
    path = tmp_path / "endless"
    if request.param.startswith("/"):
        path.symlink_to(request.param)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif request.param == "fifo":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    return path


def test_a_fifo_a_device_and_a_socket_are_no_files(endless):
    for read in (open_file, lambda path: read_file(path, 10)):
        with pytest.raises(OSError, match="Not a regular file") as caught:
            read(endless)
        assert caught.value.filename == str(endless)
    with pytest.raises(InputError, match=r"endless = 'damaged .*: mend it .Not a regular file."):
        read_json(endless, "mend it")


def test_a_file_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3000)
    assert read_file(path, 3000) == b"x" * 3000
    with pytest.raises(OSError, match="too large, at most 2 KiB are read"):
        read_file(path, 2999)
    os.truncate(path, 3 * 10**9)  # sparse
    with pytest.raises(InputError, match="at most 64 MiB are read"):
        read_json(path, "mend it")
    for name, error in {"none": FileNotFoundError, ".": IsADirectoryError}.items():
        with pytest.raises(error):
            read_file(tmp_path / name, 1)
