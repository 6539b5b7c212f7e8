"""Folders in object stores. A folder of runs has a copy on this machine, which modjax works on.

The copy of gs://BUCKET/FOLDER is buckets/gs/BUCKET/FOLDER in the user's cache folder. Object stores
can neither append nor lock, so all code reads and writes the copy, and its locks keep the processes
of this machine apart. `files.write_atomically` writes small files of a copy to the store, too.
`pull` fetches what others have written. training/stored.py does both for checkpoints.
"""

import contextlib
import errno
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from modjax.errors import MOST_SHOWN, InputError, SharedFault, one_line, require
from modjax.files import entries, is_copy, lock, reason, replace_file, user_cache

if TYPE_CHECKING:
    import tensorstore as ts

# With few retries, an object store that does not answer is an error after 15 seconds, not an hour.
FEW_RETRIES = {f"{store}_request_retries": {"max_retries": 4} for store in ("gcs", "s3", "http")}
STORE_ERRORS = (ValueError, OSError, RuntimeError)  # raised by tensorstore if a store fails
SECONDS = 60.0  # until a small file counts as not answered
TOGETHER = 16  # folders, or files of a checkpoint, in flight at once
SCHEMES = ("gs", "s3")
SMALL = re.compile(r"[^./][^/]*\.(json|jsonl|txt|safetensors)|stop")
FENCED = ("plan.json", "sweep.json", "metrics.jsonl")  # written by one process after another
LOG = "log.txt"
MISSING = b"\2"  # tensorstore's generation of an object that does not exist
NOTES = ".generations.json"  # in a folder of a copy: what the store has of its files
# Of a file: its generation in the store, and the size and time that the copy had then.
_seen: dict[Path, tuple[bytes, list[int] | None]] = {}


class Conflict(SharedFault):
    """Another machine has written a file since this process read it."""

    def __init__(self, path: Path):
        super().__init__("--workdir", url_of(path), "was written by another machine meanwhile")


def url(path: Path | str) -> str | None:
    """Returns `path` as a URL such as gs://bucket/folder, or None for a local folder."""
    found = re.fullmatch(r"([a-z][\w+.-]*):/+(.*?)/*", str(path))  # Path() folds the double slash
    if found is None:
        return None
    root = "/" if found[1] == "file" else ""
    return f"{found[1]}://{root}{found[2]}"


def shown(path: Path | str) -> str:
    """Returns `path` as text for messages. Restores the // of a URL, which Path() folds."""
    return url(path) or with_urls(str(path))


def with_urls(text: str) -> str:
    """Returns a message that names URLs in place of their copies."""
    copies = re.escape(f"{user_cache('buckets')}/")
    return re.sub(rf"{copies}(\w+)/", r"\1://", text)


def kvstore(path: Path | str) -> str:
    """Returns the tensorstore URL of a local folder or a URL."""
    return f"{url(path) or Path(path).absolute().as_uri()}/"


def open_store(path: Path | str) -> "ts.KvStore":
    """Opens the files of `path`, a local folder or a URL."""
    import tensorstore as ts

    return ts.KvStore.open(kvstore(path), context=ts.Context(FEW_RETRIES)).result()


def local(folder: Path | str) -> Path:
    """Returns the copy of a folder of runs that is a URL, or the local folder itself.

    Raises InputError for a URL that is no folder of a bucket.
    """
    found = url(folder)
    if found is None:
        return Path(folder)
    scheme, _, rest = found.partition("://")
    usable = scheme in SCHEMES and not {"", ".", ".."}.intersection(rest.split("/"))
    accepted = "must be a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
    require(usable, "--workdir", found, accepted)
    return user_cache("buckets") / scheme / rest


def url_of(path: Path) -> str | None:
    """Returns the URL of a file or a folder of a copy, or None for any other path."""
    if not is_copy(path):
        return None
    scheme, _, rest = path.relative_to(user_cache("buckets")).as_posix().partition("/")
    return f"{scheme}://{rest}"


def open_copy(folder: Path | str, *, writes: bool) -> Path:
    """Returns the copy of a folder of runs, once it has the store's small files.

    Returns a local folder as it is. Raises InputError if the store does not permit reading, and,
    if `writes`, writing.
    """
    found = local(folder)
    if not is_copy(found):
        return found
    try:
        pull(found)
        if writes:
            write(found / ".modjax", b"")
            delete(found / ".modjax")
    except OSError as error:
        raise InputError("--workdir", url(folder), f"cannot be used: {reason(error)}") from error
    return found


def read(path: Path) -> bytes | None:
    """Returns the content of a file in the store, or None if there is none. Raises OSError."""
    store, key = _place(path)
    with _errors(path):
        found = store.read(key).result(SECONDS)
    return bytes(found.value) if found.state == "value" else None


def write(path: Path, content: bytes) -> None:
    """Writes a file to the store. Raises OSError if the store fails.

    Raises Conflict for one of the FENCED files that has changed since this process read it.
    """
    known = _seen[path][0] if path in _seen and path.name in FENCED else None
    if not _write(path, content, known):
        raise Conflict(path)


def create(path: Path, content: bytes) -> bool:
    """Writes a file to the store unless it exists with another content.

    Returns whether the store has this content now. Raises OSError.
    """
    return _write(path, content, MISSING)


def _write(path: Path, content: bytes, known: bytes | None) -> bool:
    store, key = _place(path)
    with _errors(path):
        generation = store.write(key, content, if_equal=known).result(SECONDS).generation
    if not generation:  # it has another one; but the answer to an earlier try may have been lost
        with _errors(path):
            found = store.read(key).result(SECONDS)
        if found.state != "value" or bytes(found.value) != content:
            return False
        generation = found.stamp.generation
    _seen[path] = generation, None
    return True


def delete(path: Path) -> None:
    """Deletes a file in the store, if it exists. Raises OSError."""
    store, key = _place(path)
    with _errors(path):
        store.write(key, None).result(SECONDS)
    _seen.pop(path, None)


def names(folder: Path, prefix: str = "") -> list[str]:
    """Returns the names of all files below a folder in the store that begin with `prefix`.

    Raises OSError.
    """
    import tensorstore as ts

    store, key = _place(folder / "x")
    first = key[:-1] + prefix
    end = first[:-1] + chr(ord(first[-1]) + 1) if first else ""
    with _errors(folder):
        keys = store.list(ts.KvStore.KeyRange(first, end)).result(SECONDS)
    found = sorted(one.decode(errors="replace").removeprefix(key[:-1]) for one in keys)
    return [name for name in found if {"", ".", ".."}.isdisjoint(name.split("/"))]


def pull(workdir: Path) -> None:
    """Makes the small files of a copy the same as in the store. Leaves out runs done here.

    Does nothing for a folder that is no copy. Raises OSError.
    """
    if not is_copy(workdir):
        return
    found: dict[Path, set[str]] = {workdir: set()}
    found |= {folder: set() for folder in entries(workdir / "runs") if folder.is_dir()}
    for name in names(workdir):
        if match := re.fullmatch(rf"(runs/[^./][^/]*/)?({SMALL.pattern})", name):
            found.setdefault(workdir / (match[1] or ""), set()).add(match[2])
    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(_pull, found.keys(), found.values()))


def pull_run(folder: Path) -> None:
    """Does what `pull` does for the folder of one run, whose lock it waits for."""
    if is_copy(folder):
        _pull(folder, names(folder), SECONDS)


def fetch(folder: Path) -> None:
    """Does what `pull` does for the files of one folder, whose lock the caller holds."""
    get(folder, filter(SMALL.fullmatch, {*names(folder), *os.listdir(folder)}))


def _pull(folder: Path, there: Iterable[str], patience: float | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name, usual = ("lock", 0.0) if folder.parent.name == "runs" else ("plan.lock", SECONDS)
    with lock(folder / name, patience=usual if patience is None else patience) as locked:
        if not locked:  # a process of this machine writes here, and to the store
            return
        notes = {}
        with contextlib.suppress(OSError, ValueError):
            notes = json.loads((folder / NOTES).read_bytes())
            for name, (generation, stat) in notes.items():
                _seen.setdefault(folder / name, (bytes.fromhex(generation), stat))
        wanted = set(filter(SMALL.fullmatch, {*there, *os.listdir(folder)}))
        get(folder, wanted)
        seen = {name: _seen[folder / name] for name in wanted if folder / name in _seen}
        now = {name: [generation.hex(), stat] for name, (generation, stat) in seen.items()}
        if now != notes:
            replace_file(folder / NOTES, json.dumps(now).encode())


def get(folder: Path, wanted: Iterable[str]) -> None:
    """Makes files of a folder the same as in the store: fetches what is new, deletes what has gone.

    Does nothing for a folder that is no copy. Raises OSError.
    """
    if not is_copy(folder):
        return
    asked = {}
    with _errors(folder):
        for path in (folder / name for name in wanted):
            generation, stat = _seen.get(path, (None, None))
            store, key = _place(path)
            unchanged = generation if stat is not None and stat == _stat(path) else None
            asked[path] = store.read(key, if_not_equal=unchanged)
        found = {path: future.result(SECONDS) for path, future in asked.items()}
    for path, one in found.items():
        if path.name == LOG and one.state != "unspecified" and path.exists():
            if path.read_bytes().startswith(bytes(one.value)):
                continue  # a process of this machine has added to it
        if one.state == "value":
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, bytes(one.value))
        elif one.state == "missing":
            path.unlink(missing_ok=True)
        if one.state != "unspecified":
            _seen[path] = one.stamp.generation, _stat(path)


def _stat(path: Path) -> list[int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return None


def _place(path: Path) -> tuple["ts.KvStore", str]:
    """Returns the store of a file of a copy, and the file's key in it."""
    found = url_of(path)
    assert found is not None
    scheme, _, rest = found.partition("://")
    name, _, key = rest.partition("/")
    with _errors(path):
        return _store(f"{scheme}://{name}"), key


@functools.cache
def _store(bucket: str) -> "ts.KvStore":
    return open_store(bucket)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns an error of the store into an OSError that names the URL."""
    try:
        yield
    except STORE_ERRORS as error:
        why = one_line(reason(error) or "the store does not answer", MOST_SHOWN)
        raise OSError(errno.EIO, why, url_of(path)) from error
