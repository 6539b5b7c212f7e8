"""Files that others rewrite and delete meanwhile, full disks, and where caches go.

Do not ask whether a file exists before reading it: it may be gone a moment later. Call `read`.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from modjax.errors import InputError, SharedFault, words

FULL = (errno.ENOSPC, errno.EDQUOT)
# Largest file of JSON that is read, in bytes. The plan of 10,000 runs has about 1 MiB.
MOST_JSON = 64 * 2**20


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError that names no file, as those of writing and reading do, name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Missing(InputError):
    """A file that is not there, or no longer."""


def read(path: Path, remedy: str, *, last: int | None = None, most: int | None = None) -> bytes:
    """Returns the content of a regular file, or its `last` bytes.

    Raises Missing where there is no file, and InputError, with the remedy, where there is one that
    cannot be read, or that has more than `most` bytes.
    """
    try:
        if most is not None:
            return read_file(path, most)
        with open_file(path) as file:
            if last is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return file.read()
    # A ValueError: the name holds a null byte, or half a character.
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise damaged(path, remedy, reason(error), Missing) from error
    except OSError as error:
        raise damaged(path, remedy, reason(error)) from error


def read_json(path: Path, remedy: str) -> Any:
    """Returns the JSON value in a file. Raises as `read`, and InputError where it is damaged."""
    content = read(path, remedy, most=MOST_JSON)
    try:
        return json.loads(content)
    # Damaged bytes raise ValueErrors of several kinds, brackets without end a RecursionError.
    except (ValueError, RecursionError) as error:
        raise damaged(path, remedy, error) from error


def entries(folder: Path) -> list[Path]:
    """Returns what lies in a folder, sorted; [] where there is no folder, or no longer."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def damaged(
    path: Path, remedy: str, why: object, error: type[InputError] = InputError
) -> InputError:
    """Returns the error for a file that cannot be used."""
    return error(str(path), "damaged or missing", f"{remedy} ({why})")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that it holds either its old content or all of the new.

    Raises OSError that names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        said = f"{reason(error)}; nothing was written, and what was there is kept"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_file(path: Path) -> IO[bytes]:
    """Opens a regular file to read its bytes.

    Raises OSError, without waiting, for a fifo, a device or a socket: they may never end.
    """
    _check_is_file(path, os.stat(path).st_mode)  # opening a device may already do something
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


def read_file(path: Path, most: int) -> bytes:
    """Returns the bytes of a regular file. Raises OSError where it has more than `most`."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        limit = f"{most >> 20} MiB" if most >= 2**20 else f"{most >> 10} KiB"
        raise OSError(errno.EFBIG, f"File too large, at most {limit} are read", str(path))
    return content


def reason(error: BaseException) -> str:
    """Returns an error's words; those of an OSError without its number and its file."""
    return getattr(error, "strerror", None) or words(error)


class Home:
    """A folder that is in use, to notice when it is moved or deleted meanwhile."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._opened = os.stat(folder)

    def is_there(self) -> bool:
        """Returns whether the folder is still the one that was opened."""
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
    """Returns whether `error`, or an error behind it, says that the disk or a quota is full.

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
