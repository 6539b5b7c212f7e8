"""The command line: parses, calls a verb and prints. The packages do the work."""

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from modjax.bucket import open_copy, with_urls
from modjax.cli import verbs
from modjax.cli.arguments import KEEPING, RESUMING, WRITING, make_parser
from modjax.errors import MOST_SHOWN, InputError, one_line
from modjax.packages import check_packages


class Lasting:
    """A text stream that hides its errors from the writer.

    lost: the first error, or None. Everything written after it is dropped.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # characters outside the encoding are no error either
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):  # without a descriptor, nothing is left to flush
                os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting() -> Iterator[Lasting]:
    """Replaces sys.stdout and sys.stderr by `Lasting` streams, and yields the first."""
    for descriptor in (0, 1, 2):  # else the next open file would take that of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    streams = (sys.stdout, sys.stderr)
    out, err = (Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in streams)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with lasting() as out:
        overrides, rest = _split("--config.", given)
        options, rest = _split("--engine.", rest)
        try:
            args = make_parser().parse_args(rest)
        except SystemExit:  # --help and --version print, too
            if lost := _check_output(out):
                raise SystemExit(lost) from None
            raise
        args.overrides = [f"{name}={value}" for name, value in overrides.items()]
        args.engine_options = options
        if options and not hasattr(args, "engine"):
            shown = one_line(f"--engine.{next(iter(options))}", MOST_SHOWN)
            raise SystemExit(_fail(f"unrecognized arguments: {shown}: {args.called} has no engine"))
        args.command = shlex.join(["modjax", *given])
        with _quiet():
            code = _run(args)
        lost = _check_output(out)
        return lost if lost and args.called not in KEEPING else code


def _check_output(out: Lasting) -> int:
    """Returns 0, or prints that output was lost and returns the exit code for it."""
    out.flush()
    if out.lost is None or isinstance(out.lost, BrokenPipeError):  # `| head` breaks the pipe
        return 0
    return _fail(f"standard output: {out.lost.strerror}: what was printed is lost")


def _run(args: argparse.Namespace) -> int:
    """Runs the verb. Turns any exception into one line and an exit code."""
    try:
        check_packages()
        if vars(args).get("workdir") is not None:
            args.workdir = open_copy(args.workdir, writes=args.called in WRITING)
        return args.verb(args) or 0
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        line = "interrupted; the same command continues from here"
        return _fail(line, verbs.INTERRUPTED)
    except BaseException as error:  # SystemExit, too: no verb raises it
        from modjax import faults

        kept = "; what is finished is kept" if args.called in RESUMING else ""
        line = faults.machine_error_line(error, getattr(args, "workdir", None))
        if line is not None:
            return _fail(line + kept)
        return _fail(faults.bug_line(error, args.command) + kept, verbs.FAULT)


def _fail(line: str, code: int = verbs.BAD_INPUT) -> int:
    print(f"modjax: {with_urls(line)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Prints all warnings of modjax, but only errors of other libraries."""
    os.environ["MPLBACKEND"] = "agg"  # figures go into files, whatever display the user has
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.addFilter(lambda r: r.name.startswith("modjax") or r.levelno >= logging.ERROR)
    logging.getLogger().addHandler(handler)  # without one, orbax adds its own with a prefix
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _split(prefix: str, arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the values given as PREFIXname=value, and all other arguments."""
    values: dict[str, str] = {}
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith(prefix):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not remaining or remaining[0].startswith("--"):
                shown = one_line(argument, MOST_SHOWN)
                raise SystemExit(_fail(f"{shown}: needs a value, as {shown}=VALUE"))
            argument += "=" + remaining.pop(0)
        name, _, value = argument.removeprefix(prefix).partition("=")
        if name in values:
            raise SystemExit(_fail(one_line(f"{prefix}{name}: given twice", MOST_SHOWN)))
        values[name] = value
    return values, rest
