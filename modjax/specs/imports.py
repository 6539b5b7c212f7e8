"""Import of user modules under a time limit, and the hash of their source."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from modjax.errors import InputError, describe, require
from modjax.specs.fields import parts
from modjax.specs.layer import NAMES, ORIGINS

SECONDS_UNSAID = 10.0  # before a line says what still runs
SECONDS_AT_MOST = 300.0

IMPORTED: dict[str, ModuleType] = {}  # by the name in a config or in --imports


class TooLong(BaseException):
    """Error for user code that takes too long. Not an Exception, which that code may catch."""


def places(names: Any, folder: Path, field: str) -> dict[str, str]:
    """Returns the place of each name: the absolute path of a FILE.py, a module's name unchanged.

    folder: where relative paths start. Raises InputError for anything but a list of names.
    """
    fits = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
    require(fits, field, names, "must be a list of files and modules")
    return {n: os.path.realpath(folder / n) if n.endswith(".py") else n for n in names}


def import_all(where: Mapping[str, str], field: str) -> None:
    """Imports the modules of `places`. This runs user code: call it for trusted modules only.

    Raises InputError, which names `field`, for every failure.
    """
    for name, place in where.items():
        if place.endswith(".py"):
            require(os.path.isfile(place), field, name, f"no such file: {place}")
        with user_code(field, name, "cannot be imported"):
            IMPORTED[name] = _import(place)


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    stem, digest = Path(place).stem, hashlib.sha256(place.encode()).hexdigest()[:8]
    for module in list(sys.modules.values()):  # a second copy would define other classes
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and Path(file).stem == stem and os.path.realpath(file) == place:
            return module
    spec = importlib.util.spec_from_file_location(f"modjax_imports_{stem}_{digest}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


@contextlib.contextmanager
def user_code(field: str, value: str, failed: str) -> Iterator[None]:
    """Runs its body, which is user code, and turns what it raises into an InputError.

    field, value: the setting that the error names. failed: start of the reason, such as "cannot be
      imported".
    Prints go to stderr. In the main thread, a message after SECONDS_UNSAID says that the code still
    runs, and SECONDS_AT_MOST ends it. Ctrl-C stays a KeyboardInterrupt.
    """
    interrupts: list[int] = []
    try:
        with contextlib.redirect_stdout(sys.stderr), _limited(f"{field} = {value!r}", interrupts):
            yield
    except TooLong as error:
        reason = f"{failed}: it still ran after {SECONDS_AT_MOST:g} seconds"
        raise InputError(field, value, reason) from error
    except BaseException as error:
        if interrupts:  # a real Ctrl-C
            raise KeyboardInterrupt from error
        raise InputError(field, value, f"{failed}: {describe(error)}") from error


@contextlib.contextmanager
def _limited(what: str, interrupts: list[int]) -> Iterator[None]:
    """Limits the time of its body, in the main thread: first reports `what`, then raises TooLong.

    interrupts: gets an entry at each Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    began, alarms = time.monotonic(), 0

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"modjax: {what}: {line}\n".encode(errors="replace"))

    def alarm(signum: int, frame: Any) -> None:
        nonlocal alarms
        alarms += 1
        late = time.monotonic() - began - SECONDS_AT_MOST
        if late > 2 * SECONDS_UNSAID:  # the code catches everything
            say("does not end by an exception: modjax ends")
            os._exit(2)  # bad input
        if late >= 0:
            raise TooLong
        if alarms == 1:
            say(f"still runs; it ends after {SECONDS_AT_MOST:g} seconds")

    def interrupt(signum: int, frame: Any) -> None:
        interrupts.append(signum)
        before(signum, frame)

    earlier: dict[int, Any] = {signal.SIGALRM: signal.signal(signal.SIGALRM, alarm)}
    before: Any = signal.getsignal(signal.SIGINT)
    if callable(before):
        earlier[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_UNSAID, SECONDS_UNSAID)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in earlier.items():
            signal.signal(number, handler)


class Source(NamedTuple):
    """Names of a module and of the user modules that it imports, and the hash of their files."""

    modules: frozenset[str]
    digest: str


def own_layers(model: Any) -> list[str]:
    """Returns the names of the specs in a ModelSpec, such as layers, from outside modjax."""
    used = {type(spec).__name__ for spec in parts(model, deep=True)}
    return sorted(used.intersection(registered()))


def registered() -> list[str]:
    """Returns the names of all registered specs from outside modjax."""
    return [name for name, origin in ORIGINS.items() if not origin.module.startswith("modjax.")]


def without_unused(model: Any) -> Any:
    """Returns a ModelSpec without the imports that register none of its layers.

    All imports remain if a layer cannot be traced to one, as for a module that imports by variable.
    """
    layers = own_layers(model)
    by_import = {
        name: {layer for layer in layers if ORIGINS[layer].module in source_of(module).modules}
        for name in model.imports
        if (module := IMPORTED.get(name)) is not None
    }
    needed = tuple(name for name, found in by_import.items() if found)
    if needed == model.imports or set().union(*by_import.values()) != set(layers):
        return model
    return dataclasses.replace(model, imports=needed)


def layer_source(name: str) -> str:
    """Returns the hash of the source that registers a layer; it is read once per process."""
    module = sys.modules.get(ORIGINS[name].module)
    return source_of(module, NAMES[name]).digest if module is not None else ""


@functools.cache
def source_of(module: ModuleType, layer: Any = None) -> Source:
    """Returns the Source of a module. It is cached by `layer`: a redefined class is read again."""
    top = module.__name__.partition(".")[0]
    waiting, modules, contents = [module.__name__], set(), []
    while waiting:
        name = waiting.pop()
        found = sys.modules.get(name)
        file = getattr(found, "__file__", None)
        installed = name.partition(".")[0] != top and (not file or _is_installed(file))
        if name in modules or found is None or installed:
            continue
        modules.add(name)
        waiting.append(name.rpartition(".")[0])
        if file and os.path.isfile(file):
            content = Path(file).read_bytes()
            contents.append(hashlib.sha256(content).hexdigest())
            waiting += _imports(content, getattr(found, "__package__", None) or "")
    return Source(frozenset(modules), combined(contents) if contents else "")


def _is_installed(file: str) -> bool:
    """Returns whether a file belongs to Python, to an installed package, or to modjax."""
    path, homes = Path(file), (sysconfig.get_path("stdlib"), Path(__file__).parents[1])
    within = any(path.resolve().is_relative_to(Path(home).resolve()) for home in homes)
    return within or bool({"site-packages", "dist-packages"}.intersection(path.parts))


def _imports(content: bytes, package: str) -> Iterator[str]:
    """Yields the names in import statements, of modules and of other imported objects."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a compiled module, for one
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # relative, beyond the package
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def combined(digests: Iterable[str]) -> str:
    """Returns one short hash of many, which does not depend on their order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
