import errno
import json
import os

import pytest

from modjax.files import is_disk_full, write_atomically
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
