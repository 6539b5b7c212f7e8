"""Caches in object stores: uploaded whole or not at all, and read. Without TensorFlow."""

import subprocess
import sys
import time

import numpy as np
import pytest

from modjax.data.prepare.upload import MANIFEST, TOGETHER, check_writable, upload
from modjax.data.token_cache import list_caches, open_cache
from modjax.errors import InputError

URL = "gs://bucket/data/toy-bytes"
TRAIN = np.random.default_rng(0).integers(2, 259, 200_000)


@pytest.fixture
def made(make_cache):
    """A cache with more files than are uploaded at once."""
    path = make_cache(TRAIN, TRAIN[:5000])
    for i in range(2 * TOGETHER):
        (path / "0000000000000000" / f"more-{i:02}").write_text(str(i))
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
    assert list_caches("gs://bucket/data") == [cache.manifest]
    assert list_caches("gs://bucket/elsewhere") == []


def test_what_was_there_before_is_gone_once_the_new_manifest_is_there(bucket, made):
    old = {MANIFEST: b"old", "train/c/99": b"old", "a": b"old"}
    bucket.objects |= {f"data/toy-bytes/{name}": content for name, content in old.items()}
    bucket.objects["data/toy-bytes-2/kept"] = b"another"
    expected = files(made)
    upload(made, URL, ignore)
    changed = bucket.requests.index(("POST", f"data/toy-bytes/{MANIFEST}"))
    assert {method for method, _ in bucket.requests[:changed]} == {"POST"}
    gone = {name.removeprefix("data/toy-bytes/") for _, name in bucket.requests[changed + 1 :]}
    assert gone == {"train/c/99", "a"}
    assert bucket.objects.pop("data/toy-bytes-2/kept") == b"another"
    assert stored(bucket) == expected


def everything(cache) -> list[np.ndarray]:
    """Returns all training tokens of a cache, read a thousand at a time."""
    starts = range(0, len(TRAIN), 1000)
    return [cache.read("train", start, start + 1000) for start in starts]


def test_stopped_at_any_request_there_is_the_cache_before_or_the_new_one(bucket, make_cache):
    other = (TRAIN + 1) % 259
    before = make_cache(TRAIN, TRAIN[:5000], name="before", fingerprint="a" * 64)
    after = make_cache(other, other[:5000], name="after", fingerprint="b" * 64)
    tokens = {"a" * 64: TRAIN, "b" * 64: other}
    seen = []
    for answered in range(100):
        bucket.objects.clear()
        upload(before, URL, ignore)
        opened = open_cache(URL)
        bucket.left = answered
        try:
            upload(after, URL, ignore)
        except InputError:
            pass
        else:
            break
        bucket.left = None
        found = open_cache(URL)
        seen.append(found.manifest.fingerprint)
        np.testing.assert_array_equal(np.concatenate(everything(found)), tokens[seen[-1]])
        try:
            np.testing.assert_array_equal(np.concatenate(everything(opened)), TRAIN)
        except InputError as error:
            assert "was prepared anew since it was opened, as bbbbbbbb" in str(error)
        upload(after, URL, ignore)
        assert stored(bucket) == files(after)
    assert len(seen) > 10 and set(seen) == set(tokens)


def test_a_refused_file_is_one_line_and_leaves_no_cache_and_the_same_call_goes_on(bucket, made):
    expected = files(made)
    bucket.refuse.add("data/toy-bytes/0000000000000000/train/c/0")
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
    # Only the files of the refused group, and the manifest.
    assert len(bucket.requests) <= TOGETHER + 1


def test_killed_while_uploading_it_goes_on_and_ends_in_the_same_cache(bucket, made):
    expected = files(made)
    bucket.seconds = 0.2
    code = "import sys, pathlib; from modjax.data.prepare.upload import upload; "
    code += "upload(pathlib.Path(sys.argv[1]), sys.argv[2], print)"
    command = [sys.executable, "-c", code, str(made), URL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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


def test_uploaded_again_everything_is_written_again(bucket, made):
    expected = files(made)
    upload(made, URL, ignore)
    bucket.objects["data/toy-bytes/0000000000000000/train/c/0"] = b"damaged"
    upload(made, URL, ignore)
    assert stored(bucket) == expected


def test_another_cache_put_there_meanwhile_is_not_mixed_with_this_one(bucket, made, make_cache):
    expected = files(made)
    bucket.left = TOGETHER + 5
    with pytest.raises(InputError, match="run this again"):
        upload(made, URL, ignore)
    bucket.left = None
    other = make_cache(TRAIN[:9000], TRAIN[:9000], name="other", fingerprint="f" * 64)
    upload(other, URL, ignore)
    assert stored(bucket) == files(other)
    upload(made, URL, ignore)
    assert stored(bucket) == expected


def test_what_another_upload_deletes_in_the_middle_is_written_again(bucket, made):
    expected, told = files(made), []

    def report(text):
        told.append(text)
        if len(told) == 3:
            del bucket.objects["data/toy-bytes/0000000000000000/more-00"]

    upload(made, URL, report)
    assert stored(bucket) == expected


class Forgetful(dict):
    def __setitem__(self, name, content):
        if not name.endswith("more-00"):
            super().__setitem__(name, content)


def test_a_store_that_loses_a_file_gets_no_manifest(bucket, made):
    bucket.objects = Forgetful()
    with pytest.raises(InputError, match=r"cannot be written: files vanish .* is there another"):
        upload(made, URL, ignore)
    assert MANIFEST not in stored(bucket)


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
