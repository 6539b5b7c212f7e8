"""Copying a token cache into an object store, so that a usable one is there or none."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorstore as ts

from modjax.config import InputError
from modjax.data.cache import kvstore, one_line, open_store

MANIFEST = "manifest.json"
UPLOADED = ".uploaded"  # in the local cache: the files that are there already, one a line
TOGETHER = 16  # files on their way at once, some megabytes each


def check_writable(folder: str) -> None:
    """Raises InputError where nothing can be written into, or deleted from, the URL `folder`."""
    with _refusals(folder):
        store = open_store(folder)
        store.write(".modjax", b"").result()
        store.write(".modjax", None).result()


def upload(made: Path, folder: str, report: Callable[[str], None]) -> None:
    """Copies the cache in the local folder `made` to the URL `folder`, its manifest last.

    Whatever was at `folder` is deleted first, its manifest before all. Where an earlier call was
    stopped, this one goes on. Raises InputError where `folder` cannot be written.
    """
    paths = (path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file())
    names = [path.as_posix() for path in paths if not path.name.startswith(".")]
    names.remove(MANIFEST)
    journal = made / UPLOADED
    with _refusals(folder, f"; what is prepared is kept in {made}: run this again to go on"):
        store = ts.KvStore.open(kvstore(folder)).result()
        if not journal.exists() or store.read(MANIFEST).result().state == "value":
            journal.unlink(missing_ok=True)
            store.write(MANIFEST, None).result()
            store.delete_range(ts.KvStore.KeyRange()).result()
            journal.touch()
        there = set(journal.read_text().splitlines())
        waiting = [name for name in names if name not in there]
        with open(journal, "a") as file:
            for first in range(0, len(waiting), TOGETHER):
                some = waiting[first : first + TOGETHER]
                report(f"uploading: {len(names) - len(waiting) + first:,} of {len(names):,} files")
                for write in [store.write(name, (made / name).read_bytes()) for name in some]:
                    write.result()
                file.writelines(f"{name}\n" for name in some)
                file.flush()
        store.write(MANIFEST, (made / MANIFEST).read_bytes()).result()


@contextlib.contextmanager
def _refusals(folder: str, remedy: str = "") -> Iterator[None]:
    """Raises InputError for what a store refuses."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        reason = f"cannot be written: {one_line(error)}{remedy}"
        raise InputError("--data-dir", folder, reason) from error
