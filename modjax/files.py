"""Files that are written whole or not at all, what a full disk looks like, and where caches go."""

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


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


def user_cache(name: str) -> Path:
    """modjax's folder `name` among the user's caches ($XDG_CACHE_HOME)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "modjax" / name


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that the disk or a quota on it is full.

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
