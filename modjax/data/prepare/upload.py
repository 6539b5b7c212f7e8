"""Copying a token cache into an object store, so that a usable one is there or none."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorstore as ts

from modjax.data.cache import STORE_ERRORS, kvstore, open_store
from modjax.data.manifest import Manifest
from modjax.errors import MOST_SHOWN, InputError, one_line, words

MANIFEST = "manifest.json"
UPLOADED = ".uploaded"  # beside the tokens: the files that were uploaded, one a line
TOGETHER = 16  # files on their way at once, some megabytes each
ROUNDS = 5


def check_writable(folder: str) -> None:
    """Raises InputError where nothing can be written into, or deleted from, the URL `folder`."""
    with _refusals(folder):
        store = open_store(folder)
        store.write(".modjax", b"").result()
        store.write(".modjax", None).result()


def upload(made: Path, folder: str, report: Callable[[str], None]) -> None:
    """Copies the cache in the local folder `made` to the URL `folder`.

    Its files come first, beside those of a cache that is there, then its manifest, which replaces
    that one's; then all else at `folder` is deleted. Where an earlier call was stopped, this one
    goes on. Raises InputError where `folder` cannot be written.
    """
    manifest = (made / MANIFEST).read_bytes()
    tokens = made / Manifest.from_json(manifest).folder
    paths = (path for path in sorted(tokens.rglob("*")) if path.is_file())
    names = [p.relative_to(made).as_posix() for p in paths if not p.name.startswith(".")]
    journal = tokens / UPLOADED
    journal.touch()
    with _refusals(folder, f"; what is prepared is kept in {made}: run this again to go on"):
        store = ts.KvStore.open(kvstore(folder)).result()
        for _ in range(ROUNDS):
            waiting = _waiting(names, journal, store)
            if not waiting:
                break
            for first in range(0, len(waiting), TOGETHER):
                some = waiting[first : first + TOGETHER]
                report(f"uploading: {len(names) - len(waiting) + first:,} of {len(names):,} files")
                for write in [store.write(name, (made / name).read_bytes()) for name in some]:
                    write.result()
                with open(journal, "a", encoding="utf-8") as file:
                    file.writelines(f"{name}\n" for name in some)
        else:
            raise ValueError("files vanish while others are written: is there another upload?")
        store.write(MANIFEST, manifest).result()
        for other in set(_listed(store)) - {MANIFEST, *names}:
            store.write(other, None).result()
    journal.unlink()


def _waiting(names: list[str], journal: Path, store: ts.KvStore) -> list[str]:
    """Which files are still to be uploaded: also those that another upload has deleted since."""
    there = set(journal.read_text("utf-8").splitlines()).intersection(_listed(store))
    return [name for name in names if name not in there]


def _listed(store: ts.KvStore) -> list[str]:
    return [key.decode() for key in store.list().result()]


@contextlib.contextmanager
def _refusals(folder: str, remedy: str = "") -> Iterator[None]:
    """Raises InputError for what a store refuses."""
    try:
        yield
    except STORE_ERRORS as error:
        why = one_line(words(error), MOST_SHOWN)
        raise InputError("--data-dir", folder, f"cannot be written: {why}{remedy}") from error
