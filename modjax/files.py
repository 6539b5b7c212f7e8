"""Files written whole or not at all, folders that must stay, full disks, and where caches go."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modjax.errors import InputError, SharedFault, words

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError that names no file, as those of writing and reading do, name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that it holds either its old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> Any:
    """The JSON value in a file. Raises InputError, with the remedy, where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    # Damaged bytes raise ValueErrors of several kinds, brackets without end a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, remedy, getattr(error, "strerror", None) or error) from error


def damaged(path: Path, remedy: str, reason: object) -> InputError:
    """What is said of a file that cannot be used."""
    return InputError(str(path), "damaged or missing", f"{remedy} ({reason})")


class Home:
    """A folder that is in use, to notice when it is moved or deleted meanwhile."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._opened = os.stat(folder)

    def is_there(self) -> bool:
        """Whether the folder is still the one that was opened."""
        try:
            return os.path.samestat(self._opened, os.stat(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def check(self) -> None:
        """Raises SharedFault unless the folder is still the one that was opened."""
        if not self.is_there():
            raise SharedFault(
                "--workdir",
                str(self._folder),
                "was moved or deleted in the middle of a run: move it back, and the same command "
                "goes on from the newest checkpoints",
            )


def user_cache(name: str) -> Path:
    """modjax's folder `name` among the user's caches ($XDG_CACHE_HOME)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "modjax" / name


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that the disk or a quota on it is full.

    orbax, tensorstore and TensorFlow say so in words only.
    """
    full = [os.strerror(number) for number in FULL]
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(said in words(error) for said in full):
            return True
        error = error.__cause__ or error.__context__
    return False
