"""Uploads of a token cache to an object store.

At any time the store holds either a usable cache or none.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorstore as ts

from modjax.bucket import STORE_ERRORS, kvstore, open_store
from modjax.data.manifest import Manifest
from modjax.errors import MOST_SHOWN, InputError, one_line, words

MANIFEST = "manifest.json"
UPLOADED = ".uploaded"  # beside the tokens: the files that were uploaded, one a line
TOGETHER = 16  # files in flight at once, some megabytes each
ROUNDS = 5


def check_writable(folder: str) -> None:
    """Raises InputError if the URL `folder` does not permit writing and deleting."""
    with _store_errors(folder):
        store = open_store(folder)
        store.write(".modjax", b"").result()
        store.write(".modjax", None).result()


def upload(made: Path, folder: str, report: Callable[[str], None]) -> None:
    """Copies the cache in the local folder `made` to the URL `folder`.

    Uploads the files beside those of an earlier cache, then replaces the manifest, then deletes
    everything else at `folder`. Resumes where an earlier call was stopped. Raises InputError if
    `folder` cannot be written.
    """
    manifest = (made / MANIFEST).read_bytes()
    tokens = made / Manifest.from_json(manifest).folder
    paths = (path for path in sorted(tokens.rglob("*")) if path.is_file())
    names = [p.relative_to(made).as_posix() for p in paths if not p.name.startswith(".")]
    journal = tokens / UPLOADED
    journal.touch()
    with _store_errors(folder, f"; what is prepared is kept in {made}: run this again to go on"):
        store = ts.KvStore.open(kvstore(folder)).result()
        for _ in range(ROUNDS):
            # Another upload may have deleted files since.
            there = set(journal.read_text("utf-8").splitlines()).intersection(_listed(store))
            waiting = [name for name in names if name not in there]
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


def _listed(store: ts.KvStore) -> list[str]:
    return [key.decode() for key in store.list().result()]


@contextlib.contextmanager
def _store_errors(folder: str, remedy: str = "") -> Iterator[None]:
    """Turns a store error into an InputError whose message ends with `remedy`."""
    try:
        yield
    except STORE_ERRORS as error:
        why = one_line(words(error), MOST_SHOWN)
        raise InputError("--data-dir", folder, f"cannot be written: {why}{remedy}") from error
