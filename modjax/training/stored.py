"""Digests of checkpoints, and the bucket's checkpoints beside those of its copy, see bucket.py.

A checkpoint in the bucket counts once it has its digest.json, which lists the others: it is written
last and deleted first. No other file is ever written over: a process that has lost its run, and
does not know it yet, cannot damage a checkpoint of the next one.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modjax.bucket import Conflict, create, delete, names, read, write
from modjax.errors import describe
from modjax.files import MOST_JSON, entries, is_copy, read_file

DIGEST = "digest.json"
WRITTEN_AT_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")
WITH_THEM = ("metrics.jsonl", "log.txt")  # files of the run that are not written atomically
TOGETHER = 4  # files in flight at once


def pull_newest(folder: Path) -> None:
    """Makes the newest whole checkpoint of the bucket the newest of the copy.

    Deletes half-written ones in the bucket: only the process that holds the run may call this.
    Does nothing for a folder that is no copy. Raises OSError.
    """
    if not is_copy(folder):
        return
    there = _stored(folder)
    for step, files in there.items():
        if DIGEST not in files:
            _delete(folder / str(step), files)
    whole = {step: files for step, files in there.items() if DIGEST in files}
    for path in entries(folder):
        if path.name.isdigit() and int(path.name) not in whole:
            shutil.rmtree(path, ignore_errors=True)
    for step in sorted(whole, reverse=True):
        _pull(folder / str(step), whole[step])
        if find_damage(folder / str(step)) is None:
            break


def pull_one(checkpoint: Path) -> None:
    """Fetches one checkpoint, unless the copy has it. Raises OSError."""
    if is_copy(checkpoint):
        _pull(checkpoint, names(checkpoint))


def push(folder: Path) -> None:
    """Makes the bucket's checkpoints, metrics and log the same as those of the copy.

    Raises OSError, and Conflict if another process writes the run.
    """
    with_them = [folder.with_name(name) for name in WITH_THEM]
    for path in filter(Path.exists, with_them):  # a checkpoint needs the lines before it
        write(path, path.read_bytes())
    there = _stored(folder)
    here = {int(path.name): path for path in entries(folder) if path.name.isdigit()}
    for step, path in here.items():
        digest = (path / DIGEST).read_bytes()
        if DIGEST in there.get(step, ()) and read(path / DIGEST) == digest:
            continue
        _delete(path, there.get(step, ()))
        files = [f for f in path.rglob("*") if f.is_file() and f.name != DIGEST]
        with ThreadPoolExecutor(TOGETHER) as pool:
            written = list(pool.map(lambda file: create(file, file.read_bytes()), files))
        if not (all(written) and create(path / DIGEST, digest)):
            raise Conflict(path)
    for step in there.keys() - here.keys():
        _delete(folder / str(step), there[step])


def _stored(folder: Path) -> dict[int, list[str]]:
    """Returns the names of the files of each checkpoint in the bucket, by its step."""
    found: dict[int, list[str]] = {}
    for name in names(folder):
        step, _, rest = name.partition("/")
        if step.isdigit():
            found.setdefault(int(step), []).append(rest)
    return found


def _delete(checkpoint: Path, files: Iterable[str]) -> None:
    for name in sorted(files, key=lambda name: name != DIGEST):
        delete(checkpoint / name)


def _pull(checkpoint: Path, files: Iterable[str]) -> None:
    """Fetches a checkpoint, unless the copy has the same one."""
    digest = read(checkpoint / DIGEST)
    with contextlib.suppress(OSError):
        if (checkpoint / DIGEST).read_bytes() == digest and find_damage(checkpoint) is None:
            return
    temporary = checkpoint.parent.with_name(f".{checkpoint.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)

    def fetch(name: str) -> None:
        file = temporary / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(read(checkpoint / name) or b"")

    with ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(fetch, files))
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # the bucket has no file of it
        temporary.rename(checkpoint)


def find_damage(folder: Path) -> str | None:
    """Returns how a checkpoint differs from its digest, as text, or None if it does not."""
    try:
        expected, found = json.loads(read_file(folder / DIGEST, MOST_JSON)), digest_of(folder)
        changed = [name for name, digest in expected.items() if found.get(name) != digest]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return describe(error)
    if changed:
        return f"{changed[0]} has changed or is missing"
    unknown = found.keys() - expected.keys()
    return f"{DIGEST} leaves out {min(unknown)}" if unknown else None


def digest_of(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file, except the digest and files that orbax writes after it."""
    digest = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in (DIGEST, *WRITTEN_AT_COMMIT):
            with open(path, "rb") as file:
                digest[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest
