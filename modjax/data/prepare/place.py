"""How what was prepared takes its place, so that an open cache is never read as another one.

`.NAME-VOCAB.partial` becomes a folder of NAME-VOCAB; then the manifest that names that folder
replaces the one before; only then is the folder before removed. A kill in between costs nothing.
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
    """Holds the cache `folder`. Raises InputError where another process does."""
    where = str(folder.parent)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError("--data-dir", where, f"cannot be read: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            ours = False
        require(
            ours,
            "--data-dir",
            where,
            f"another process is preparing {folder.name}; wait for it to end",
        )
        yield
    finally:
        os.close(handle)


def begin(partial: Path, final: Path) -> None:
    """Makes `partial`, or takes up what an earlier run has left of it."""
    try:
        for moved in final.glob("*/manifest.json"):  # it was killed within _put_in_place
            if not partial.exists():
                os.rename(moved.parent, partial)
        partial.mkdir(exist_ok=True)
        (partial / "scratch").mkdir(exist_ok=True)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise InputError("--data-dir", str(final.parent), reason) from error


def put_in_place(partial: Path, final: Path) -> None:
    """Makes `partial` a folder of the cache `final`, then its manifest that of the cache."""
    folder = final / Manifest.from_json((partial / "manifest.json").read_bytes()).folder
    shutil.rmtree(final / ".old", ignore_errors=True)
    if folder.exists():  # the same tokens, which may be damaged
        os.rename(folder, final / ".old")
    os.rename(partial, folder)
    os.replace(folder / "manifest.json", final / "manifest.json")
    tidy(final)


def tidy(final: Path) -> None:
    """Removes what is not, or no longer, part of the cache `final`."""
    folder = Manifest.from_json((final / "manifest.json").read_bytes()).folder
    others = [path for path in final.iterdir() if path.name not in ("manifest.json", folder)]
    for path in [*others, final / folder / "journal.json", *(final / folder).glob(".*.tmp")]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
