"""Starting jax, which environment variables or a lack of memory can prevent."""

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
    """Sets up jax for a process that modjax owns, then imports the modules of --imports.

    imports: each value of --imports and its absolute path or module, as `places` returns them.
    Raises InputError if the environment prevents jax, or if a module cannot be imported.
    """
    from modjax.provenance import fix_settings
    from modjax.specs.imports import import_all

    os.environ.update(compilation_cache())
    check_xla_starts()
    import_all(imports or {}, "--imports")
    with starting():
        fix_settings()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Turns errors of importing jax, or of its first use, into an InputError.

    Lets ModuleNotFoundError pass: no environment variable causes it.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise _refused(describe(error)) from error


def check_xla_starts() -> None:
    """Raises InputError if XLA would abort this process, which no exception handler can catch.

    XLA aborts on unknown flags, and for lack of memory. If XLA_FLAGS or a memory limit is set,
    starts jax in another process first, which takes seconds.
    """
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited or os.environ.get("XLA_FLAGS"):
        tried = subprocess.run(
            [sys.executable, "-P", "-c", TRIAL],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # it knows the flags of every platform
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        if tried.returncode != 0:
            raise _refused(last_line(tried.stderr.decode(errors="replace")))


def last_line(output: str) -> str:
    """Returns the last line of `output`, without Python's crash report and XLA's log prefix."""
    said, crash, _ = output.strip().partition("Fatal Python error")
    last = said.strip().splitlines() or [crash or "it said nothing"]
    return re.sub(r"^F\d+ .*?\] ", "", last[-1])  # without the prefix of XLA's fatal errors


def compilation_cache() -> dict[str, str]:
    """Returns the environment variables that make jax cache every compiled program.

    The cache lies in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.
    """
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(user_cache("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {name: os.environ.get(name) or value for name, value in defaults.items()}


def _refused(why: str) -> InputError:
    read = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_")) and "_CACHE_" not in name  # modjax sets the cache's
    }
    return InputError("environment", read, f"jax cannot start: {why}")
