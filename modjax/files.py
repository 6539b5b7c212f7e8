"""Files written whole or not at all, files read up to a limit, full disks, where caches go."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from modjax.errors import InputError, SharedFault

FULL = (errno.ENOSPC, errno.EDQUOT)
# What a path that cannot be used ends in: no fault of the program, and said in one line.
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)

# Largest file of JSON that is read, in bytes. The plan of 10,000 runs has about 1 MiB.
MOST_JSON = 64 * 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that it holds either its old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
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


def read_json(path: Path, remedy: str) -> Any:
    """Returns the JSON value in a file.

    Raises InputError, with the remedy, where it cannot be read.
    """
    try:
        return json.loads(read_file(path, MOST_JSON))
    # Damaged bytes raise ValueErrors of several kinds, brackets without end a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, remedy, getattr(error, "strerror", None) or error) from error


def damaged(path: Path, remedy: str, reason: object) -> InputError:
    """Returns the error that names a file that cannot be used."""
    return InputError(str(path), "damaged or missing", f"{remedy} ({reason})")


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
    words = [os.strerror(number) for number in FULL]
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(said in str(error) for said in words):
            return True
        error = error.__cause__ or error.__context__
    return False
