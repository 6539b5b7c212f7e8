"""Atomic replacement of a cache, so that an open cache never reads the tokens of another.

`.NAME-VOCAB.partial` moves into NAME-VOCAB as a folder; then the manifest that names this folder
replaces the old manifest; then the old folder is removed. A kill in between loses nothing.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from modjax.data.manifest import Manifest
from modjax.errors import InputError, require


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the cache `folder`. Raises InputError if another process holds the lock."""
    where = str(folder.parent)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError("--data-dir", where, f"cannot be read: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have deleted the folder.
            ours = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            ours = False
        remedy = f"another process is preparing {folder.name}; wait for it to end"
        require(ours, "--data-dir", where, remedy)
        yield
    finally:
        os.close(handle)


def begin(partial: Path, final: Path) -> None:
    """Makes the folder `partial`, or recovers the one of an earlier run."""
    try:
        for moved in final.glob("*/manifest.json"):  # a run was killed within `put_in_place`
            if not partial.exists():
                os.rename(moved.parent, partial)
        partial.mkdir(exist_ok=True)
        (partial / "scratch").mkdir(exist_ok=True)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise InputError("--data-dir", str(final.parent), reason) from error


def put_in_place(partial: Path, final: Path) -> None:
    """Moves `partial` into the cache `final`, then replaces the manifest of the cache."""
    folder = final / Manifest.from_json((partial / "manifest.json").read_bytes()).folder
    shutil.rmtree(final / ".old", ignore_errors=True)
    if folder.exists():  # the same tokens, but they may be damaged
        os.rename(folder, final / ".old")
    os.rename(partial, folder)
    os.replace(folder / "manifest.json", final / "manifest.json")
    tidy(final)


def tidy(final: Path) -> None:
    """Removes everything that the manifest of the cache `final` does not name."""
    folder = Manifest.from_json((final / "manifest.json").read_bytes()).folder
    others = [path for path in final.iterdir() if path.name not in ("manifest.json", folder)]
    for path in [*others, final / folder / "journal.json", *(final / folder).glob(".*.tmp")]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
