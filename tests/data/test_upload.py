"""Caches in object stores: uploaded whole or not at all, and read from there. No TensorFlow."""

import subprocess
import sys
import time

import numpy as np
import pytest

from modjax.config import InputError
from modjax.data.cache import describe, open_cache
from modjax.data.upload import MANIFEST, TOGETHER, check_writable, upload

URL = "gs://bucket/data/toy-bytes"
TRAIN = np.random.default_rng(0).integers(2, 259, 200_000)


@pytest.fixture
def made(make_cache):
    """A cache with more files than are on their way at once."""
    path = make_cache(TRAIN, TRAIN[:5000])
    for i in range(2 * TOGETHER):
        (path / f"more-{i:02}").write_text(str(i))
    return path


def stored(bucket, prefix="data/toy-bytes/"):
    return {name.removeprefix(prefix): content for name, content in bucket.objects.items()}


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def ignore(text):
    pass


def test_an_uploaded_cache_is_complete_readable_and_its_manifest_came_last(bucket, made):
    expected, told = files(made), []
    upload(made, URL, told.append)
    assert stored(bucket) == expected
    assert bucket.requests[-1] == ("POST", f"data/toy-bytes/{MANIFEST}")
    assert told[0] == f"uploading: 0 of {len(expected) - 1} files"
    cache = open_cache(URL)
    np.testing.assert_array_equal(cache.read("train", 0, 200_000), TRAIN)
    assert describe("gs://bucket/data") == [cache.manifest]
    assert describe("gs://bucket/elsewhere") == []


def test_what_was_there_before_is_gone_its_manifest_first(bucket, made):
    old = {MANIFEST: b"old", "train/c/99": b"old", "a": b"old"}
    bucket.objects |= {f"data/toy-bytes/{name}": content for name, content in old.items()}
    bucket.objects["data/toy-bytes-2/kept"] = b"another"
    expected = files(made)
    upload(made, URL, ignore)
    assert bucket.requests[0] == ("DELETE", f"data/toy-bytes/{MANIFEST}")
    assert bucket.objects.pop("data/toy-bytes-2/kept") == b"another"
    assert stored(bucket) == expected


def test_a_refused_file_is_one_line_and_leaves_no_cache_and_the_same_call_goes_on(bucket, made):
    expected = files(made)
    bucket.refuse.add("data/toy-bytes/train/c/0")
    with pytest.raises(InputError) as caught:
        upload(made, URL, ignore)
    message = str(caught.value)
    assert message.startswith(f"--data-dir = {URL!r}: cannot be written: PERMISSION_DENIED")
    assert "\n" not in message and str(made) in message and "run this again" in message
    with pytest.raises(InputError, match="no token cache here"):
        open_cache(URL)
    bucket.refuse.clear()
    first = {name for _, name in bucket.requests}
    assert len(first) > 2 * TOGETHER
    bucket.requests.clear()
    upload(made, URL, ignore)
    assert stored(bucket) == expected
    again = [name for _, name in bucket.requests]
    assert len(again) <= TOGETHER + 1, "only the files of the refused group, and the manifest"


def test_killed_while_uploading_it_goes_on_and_ends_in_the_same_cache(bucket, made):
    expected = files(made)
    bucket.seconds = 0.2
    code = "import sys, pathlib; from modjax.data.upload import upload; "
    code += "upload(pathlib.Path(sys.argv[1]), sys.argv[2], print)"
    process = subprocess.Popen([sys.executable, "-c", code, str(made), URL],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 60
    while len(bucket.objects) <= TOGETHER:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert MANIFEST not in stored(bucket)
    bucket.seconds = 0.0
    bucket.requests.clear()
    upload(made, URL, ignore)
    assert stored(bucket) == expected
    assert len(bucket.requests) <= len(expected) - TOGETHER


def test_another_cache_put_there_meanwhile_is_not_mixed_with_this_one(bucket, made):
    expected = files(made)
    upload(made, URL, ignore)
    bucket.objects["data/toy-bytes/train/c/0"] = b"of another cache"
    upload(made, URL, ignore)
    assert stored(bucket) == expected


def test_a_place_that_can_be_written_is_left_as_it_was(bucket, tmp_path):
    check_writable(URL)
    assert bucket.objects == {}
    check_writable(f"file://{tmp_path}/new")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (URL, "PERMISSION_DENIED"),
        ("http://127.0.0.1:9/data", "does not support writing"),
        ("ftp://somewhere/data", "unsupported URL scheme"),
        ("gs://b/data", "Invalid GCS bucket name"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_in_one_line(bucket, folder, reason):
    bucket.refuse.add("data/toy-bytes/.modjax")
    with pytest.raises(InputError, match=reason) as caught:
        check_writable(folder)
    assert str(caught.value).startswith(f"--data-dir = {folder!r}: cannot be written: ")
    assert "\n" not in str(caught.value)
