"""The start of jax, which an environment can prevent: by its variables, or for want of memory."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping

from modjax.errors import InputError, describe
from modjax.files import user_cache

TRIAL = "import jax; jax.devices()"


def start(imports: Mapping[str, str] | None = None) -> None:
    """Sets up jax for a process that modjax owns, and imports modules that --imports names.

    Raises InputError where the environment prevents jax, or a module cannot be imported.
    """
    from modjax.provenance import fix_settings
    from modjax.specs.imports import import_all

    os.environ.update(compilation_cache())
    try_first()
    import_all(imports or {}, "--imports")
    with starting():
        fix_settings()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Raises InputError where what is inside, imports of jax or its first use, fails.

    A missing module is no matter of the environment's variables, and passes as it is.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise _refused(describe(error)) from error


def try_first() -> None:
    """Raises InputError where XLA would abort this process, which no handler survives.

    XLA aborts over flags that it does not know, and where memory is limited. Only then are the
    seconds worth it that another process takes to try.
    """
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited or os.environ.get("XLA_FLAGS"):
        tried = subprocess.run(
            [sys.executable, "-P", "-c", TRIAL],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # whose flags are those of all platforms
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        if tried.returncode != 0:
            raise _refused(last_line(tried.stderr.decode(errors="replace")))


def last_line(output: str) -> str:
    """Returns the last line that a process printed, before Python's account of a crash."""
    said, crash, _ = output.strip().partition("Fatal Python error")
    last = said.strip().splitlines() or [crash or "it said nothing"]
    return re.sub(r"^F\d+ .*?\] ", "", last[-1])  # the words of XLA's fatal lines


def compilation_cache() -> dict[str, str]:
    """Environment in which jax keeps every compiled program for the next process.

    JAX_COMPILATION_CACHE_DIR moves the cache from its place in the user's cache folder.
    """
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(user_cache("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {name: os.environ.get(name) or value for name, value in defaults.items()}


def _refused(why: str) -> InputError:
    # modjax sets those of jax's cache itself.
    read = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_")) and "_CACHE_" not in name
    }
    return InputError("environment", read, f"jax cannot start: {why}")
