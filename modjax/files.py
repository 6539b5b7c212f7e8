"""Reading and writing files that other processes may rewrite or delete at any time.

Call `read` without asking first whether a file exists: it may be gone a moment later.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from modjax.errors import InputError, SharedFault, words

FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_JSON = 64 * 2**20  # bytes of a JSON file; the plan of 10,000 runs has about 1 MiB


class Missing(InputError):
    """A file that does not exist, or no longer exists."""


def read(path: Path, remedy: str, *, last: int | None = None, most: int | None = None) -> bytes:
    """Returns the content of a regular file, or its `last` bytes.

    Raises Missing if there is no file. Raises InputError, with the remedy, if the file cannot be
    read or has more than `most` bytes.
    """
    try:
        if most is not None:
            return read_file(path, most)
        with open_file(path) as file:
            if last is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return file.read()
    # A ValueError means that the path holds a null byte or half a character.
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise damaged(path, remedy, reason(error), Missing) from error
    except OSError as error:
        raise damaged(path, remedy, reason(error)) from error


def read_json(path: Path, remedy: str) -> Any:
    """Returns the JSON value in a file. Raises as `read` does, and InputError for damaged JSON."""
    content = read(path, remedy, most=MOST_JSON)
    try:
        return json.loads(content)
    # Damaged bytes raise several kinds of ValueError; endless brackets raise a RecursionError.
    except (ValueError, RecursionError) as error:
        raise damaged(path, remedy, error) from error


def read_file(path: Path, most: int) -> bytes:
    """Returns the bytes of a regular file. Raises OSError if it has more than `most`."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        limit = f"{most >> 20} MiB" if most >= 2**20 else f"{most >> 10} KiB"
        raise OSError(errno.EFBIG, f"File too large, at most {limit} are read", str(path))
    return content


def open_file(path: Path) -> IO[bytes]:
    """Opens a regular file to read its bytes.

    Raises OSError at once for a fifo, a device or a socket, whose content may never end.
    """
    _check_is_file(path, os.stat(path).st_mode)  # opening a device may already have an effect
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_is_file(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def _check_is_file(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def entries(folder: Path) -> list[Path]:
    """Returns the sorted content of a folder, or [] if there is no such folder."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file, which at any time holds its old content or all of the new.

    Writes a file of a bucket's copy to the bucket first, see bucket.py.
    Raises an OSError that names the file.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_copy(path) and "checkpoints" not in path.parts:
        from modjax.bucket import write

        write(path, content)
    replace_file(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Does what `write_atomically` does, on this machine alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        said = f"{reason(error)}; nothing was written, and the old content is kept"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Deletes a file, if it exists; in the bucket, too, if it belongs to the copy of one."""
    if is_copy(path):
        from modjax.bucket import delete

        delete(path)
    path.unlink(missing_ok=True)


def damaged(
    path: Path, remedy: str, why: object, kind: type[InputError] = InputError
) -> InputError:
    """Returns the error for a file that cannot be used."""
    return kind(str(path), "damaged or missing", f"{remedy} ({why})")


def reason(error: BaseException) -> str:
    """Returns the message of an error, without the number and the file of an OSError."""
    return getattr(error, "strerror", None) or words(error)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to an OSError that names no file. Errors of read() and write() name none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether `error`, or an error that caused it, means a full disk or quota.

    orbax, tensorstore and TensorFlow name the cause in their messages only.
    """
    full = [os.strerror(number) for number in FULL]
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(said in words(error) for said in full):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def lock(path: Path, *, patience: float = 0.0, shared: bool = False) -> Iterator[bool]:
    """Locks the file `path` for the `with` block; yields False if another process has locked it.

    patience: seconds to keep trying.
    shared: takes a read lock, to see whether the file is locked. Raises FileNotFoundError if there
      is no file.
    The kernel releases the lock when the process ends, however it ends.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience
    locked = False
    # Looking must not need the right to write: a sweep may be someone else's.
    file = os.open(path, os.O_RDONLY if shared else os.O_CREAT | os.O_RDWR, 0o666)
    try:
        while not locked:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        yield locked
    finally:
        os.close(file)


class WatchedFolder:
    """A folder in use, which notices that it was moved or deleted.

    guard: called by `check`, and may raise an error of its own.
    """

    def __init__(self, folder: Path, guard: Callable[[], None] = lambda: None):
        self.folder, self._guard = folder, guard
        self._opened = os.stat(folder)

    def is_there(self) -> bool:
        """Returns whether the path still leads to the folder that was opened."""
        try:
            return os.path.samestat(self._opened, os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def check(self) -> None:
        """Raises SharedFault unless `is_there`. Call it before each write."""
        self._guard()
        if not self.is_there():
            accepted = (
                "was moved or deleted in the middle of a run: move it back, and the same command "
                "continues from the newest checkpoints"
            )
            raise SharedFault("--workdir", str(self.folder), accepted)


def user_cache(name: str) -> Path:
    """Returns modjax's folder `name` in the user's cache folder ($XDG_CACHE_HOME)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "modjax" / name


def is_copy(path: Path) -> bool:
    """Returns whether a path belongs to the copy of a bucket, see bucket.py."""
    return path.is_relative_to(user_cache("buckets"))
