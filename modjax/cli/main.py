"""The command line: parses, calls a verb and prints. The packages do the work."""

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

from modjax.cli import output, verbs
from modjax.cli.arguments import KEEPING, RESUMING, make_parser
from modjax.errors import MOST_SHOWN, InputError, one_line
from modjax.packages import check_packages


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with output.lasting() as out:
        overrides, rest = _split(given)
        try:
            args = make_parser().parse_args(rest)
        except SystemExit:  # --help and --version print, too
            if lost := _check_output(out):
                raise SystemExit(lost) from None
            raise
        args.overrides = overrides
        args.command = shlex.join(["modjax", *given])
        with _quiet():
            code = _run(args)
        lost = _check_output(out)
        return lost if lost and args.called not in KEEPING else code


def _check_output(out: output.Lasting) -> int:
    """Returns 0, or prints that output was lost and returns the exit code for it."""
    out.flush()
    if out.lost is None or isinstance(out.lost, BrokenPipeError):  # `| head` breaks the pipe
        return 0
    return _fail(f"standard output: {out.lost.strerror}: what was printed is lost")


def _run(args: argparse.Namespace) -> int:
    """Runs the verb. Turns any exception into one line and an exit code."""
    try:
        check_packages()
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
    print(f"modjax: {line}", file=sys.stderr)
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


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides as "a.b=value", and all other arguments."""
    overrides: dict[str, str] = {}
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not remaining or remaining[0].startswith("--"):
                shown = one_line(argument, MOST_SHOWN)
                raise SystemExit(_fail(f"{shown}: needs a value, as {shown}=VALUE"))
            argument += "=" + remaining.pop(0)
        name, _, value = argument.removeprefix("--config.").partition("=")
        if name in overrides:
            raise SystemExit(_fail(one_line(f"--config.{name}: given twice", MOST_SHOWN)))
        overrides[name] = value
    return [f"{name}={value}" for name, value in overrides.items()], rest
