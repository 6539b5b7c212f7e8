"""The command line: parse, call, print. What a verb does lives in the packages."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence

from modjax import verbs
from modjax.arguments import make_parser
from modjax.errors import InputError
from modjax.packages import check_packages


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides, rest = _split(given)
    args = make_parser().parse_args(rest)
    args.overrides = overrides
    args.command = shlex.join(["modjax", *given])
    _be_quiet()
    try:
        check_packages()
        return args.verb(args) or 0
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("modjax: interrupted; the same command goes on from here", file=sys.stderr)
        return verbs.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, like `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from modjax.files import UNUSABLE, is_disk_full

        where = getattr(error, "filename", None)
        if is_disk_full(error):
            where = where or getattr(args, "workdir", None) or "disk"
            return _fail(
                f"{where}: no space left: free some and give the same command again; "
                "finished runs and checkpoints are kept"
            )
        if isinstance(error, OSError) and error.errno in UNUSABLE and where is not None:
            return _fail(f"{_shortened(str(where))}: {error.strerror}")
        raise


def _fail(line: str) -> int:
    print(f"modjax: {line}", file=sys.stderr)
    return verbs.BAD_INPUT


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"


def _be_quiet() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # an alphabet without our letters ends nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides as "a.b=value", and all other arguments."""
    overrides, rest = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not remaining or remaining[0].startswith("--"):
                raise SystemExit(_fail(f"{argument}: needs a value, as {argument}=VALUE"))
            argument += "=" + remaining.pop(0)
        overrides.append(argument.removeprefix("--config."))
    return overrides, rest


if __name__ == "__main__":
    sys.exit(main())
