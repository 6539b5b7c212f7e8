"""One line for an exception that nothing else has caught, with its traceback in a file."""

import platform
import sys
import tempfile
import traceback
from errno import EAGAIN, EFBIG, EIO, EMFILE, ENFILE, ENOENT, ENOMEM
from pathlib import Path

import modjax
from modjax.errors import MOST_SHOWN, describe, one_line
from modjax.files import is_disk_full

MACHINE = (ENOENT, EMFILE, ENFILE, ENOMEM, EAGAIN, EFBIG, EIO)  # even if they name no file
OUT_OF_MEMORY = (  # in XLA's words, when it runs and when it compiles
    "RESOURCE_EXHAUSTED: Out of memory",
    "RESOURCE_EXHAUSTED: Ran out of memory",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory",
    "RESOURCE_EXHAUSTED: Error allocating device buffer",
    "std::bad_alloc",
)


def machine_error_line(error: BaseException, folder: Path | None = None) -> str | None:
    """Returns one line for an error that the machine caused, or None for any other error.

    folder: the folder in use, named if the error itself names no file.
    """
    named = getattr(error, "filename", None)
    where = named or folder
    if is_disk_full(error):
        said = "no space left: free some and give the same command again"
        return f"{one_line(str(where or 'disk'), MOST_SHOWN)}: {said}"
    if is_out_of_memory(error):
        return f"out of memory: {describe(error)}"
    if isinstance(error, OSError) and (named is not None or error.errno in MACHINE):
        shown = one_line(str(where or "this machine"), MOST_SHOWN)
        return one_line(f"{shown}: {error.strerror}", MOST_SHOWN * 2)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    said = describe(error)
    return isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY)


def bug_line(error: BaseException, command: str) -> str:
    """Returns one line for a fault of modjax. Writes its traceback to a file, or to stderr."""
    said = f"a fault of modjax, not of your input: {describe(error)}"
    text = f"{command}\nmodjax {modjax.__version__}, Python {sys.version}, {platform.platform()}\n"
    text += "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="modjax-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        print(text, file=sys.stderr)
        return f"{said}; please report it with the traceback above"
    return f"{said}; please report it with {path}"
