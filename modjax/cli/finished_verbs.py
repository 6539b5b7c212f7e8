"""The verbs that open finished runs again: eval and sample.

Imports are inside the functions, so that every verb starts as fast as what it needs.
"""

import argparse
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modjax.backend import start, starting
from modjax.cli.verbs import RUNS_FAILED, print_json
from modjax.errors import InputError, require
from modjax.files import read_file, reason
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.finished.runs import Comparison

# Caches are made for all of them at once.
MOST_TOKENS = 1_000_000
MOST_PROMPTS = 16 * 2**20  # bytes of a file of prompts


def _prepare(args: argparse.Namespace) -> None:
    """Starts jax and imports the layers from outside, before anything of a run is read."""
    from modjax.specs.imports import places

    start(places(args.imports, Path(), "--imports"))


def evaluate(args: argparse.Namespace) -> int:
    _prepare(args)
    with starting():
        from modjax.finished.runs import choose, compare, open_run

    specs, failures = choose(args.workdir, args.run, routed=True)
    _check_slack(args.slack)
    bounded = args.slack is None or args.routing != "trained"
    require(
        bounded,
        "--slack",
        args.slack,
        "bounds routing that never looks ahead; training takes its capacity, no more",
    )
    if args.run is None:  # a sweep may hold models that have not learned this routing
        able = [spec for spec in specs if args.routing in spec.model.routings]
        specs = able or specs
    for spec in specs:
        spec.model.check_routing(args.routing, "--routing")
    found = []
    for spec in specs:
        try:
            _check_code(args, spec)
            run = open_run(spec, workdir=args.workdir, data_dir=args.data_dir)
            found.append(compare(run, args.routing, args.slack))
        except InputError as error:
            failures[spec.run_id] = error
            continue
        if not args.json:
            print(_comparison_text(found[-1]), flush=True)
    if not found and len(set(map(str, failures.values()))) == 1:  # such as data that is missing
        raise next(iter(failures.values()))
    if args.json:
        print_json([_plain(comparison) for comparison in found])
    for run_id, why in failures.items():
        print(f"modjax: failed: {run_id}: {why}", file=sys.stderr)
    return RUNS_FAILED if failures else 0


def _check_code(args: argparse.Namespace, spec: RunSpec) -> None:
    from modjax.provenance import require_readable
    from modjax.records import run_dir

    if not args.other_code:
        require_readable({run_dir(args.workdir, spec.run_id): spec.model})


def _comparison_text(found: "Comparison") -> str:
    from modjax.scaling.formatting import count
    from modjax.scaling.report.terminal import text_table

    bound = "" if found.slack is None else f", room for {found.slack:g} times the capacity"
    gap = found.difference
    header = (
        f"{found.run_id}\n"
        f"trained {found.trained.loss:.4f}   {found.routing} {found.causal.loss:.4f}   "
        f"difference {gap.loss:+.4f} +- {gap.sem:.4f} ({gap.loss / found.trained.loss:+.2%}) over "
        f"{count(gap.tokens)} tokens{bound}"
    )
    names = list(dict.fromkeys(name for layer in found.layers.values() for name in layer))
    rows = [
        (place, *(_cell(layer.get(name)) for name in names))
        for place, layer in found.layers.items()
    ]
    return f"{header}\n{text_table(('layer', *names), rows)}\n"


def _cell(value: float | None) -> str:
    """Returns a share in percent; counts stay as they are."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.1%}"


def _check_slack(slack: float | None) -> None:
    finite = slack is None or 0 < slack < math.inf
    require(finite, "--slack", slack, "must be greater than 0, and finite")


def _plain(value: Any) -> Any:
    """Named tuples as dicts."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def sample(args: argparse.Namespace) -> None:
    _prepare(args)
    with starting():
        from rich.console import Console

        from modjax.decoding.generate import Sampling
        from modjax.finished.runs import choose, open_run
        from modjax.finished.text import choose_routing, coloured, numbered, sample
        from modjax.nn import unstack

    prompts = _prompts(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    require(args.tokens > 0, "--tokens", args.tokens, "must be greater than 0")
    require(args.tokens <= MOST_TOKENS, "--tokens", args.tokens, f"must be at most {MOST_TOKENS}")
    _check_slack(args.slack)
    # JAX takes the lower 32 bits without a word.
    require(0 <= args.seed < 2**32, "--seed", args.seed, "must be 0 or more, and below 2**32")
    specs, failures = choose(args.workdir, args.run)
    if failures:  # one of these may be the run that was meant
        raise next(iter(failures.values()))
    if args.routing is not None:
        for spec in specs[-1:]:
            spec.model.check_routing(args.routing, "--routing")
    require(
        len(specs) == 1,
        "--run",
        args.run,
        f"must name one of the {len(specs)} finished runs, such as {specs[-1].run_id}",
    )
    _check_code(args, specs[0])
    run = open_run(specs[0], workdir=args.workdir, data_dir=args.data_dir)
    choose_routing(run, args.routing)
    graphdef, weights = unstack(
        run.model.graphdef, run.weights
    )  # once, for every part of the stream
    run = run._replace(model=run.model._replace(graphdef=graphdef), weights=weights)
    streams = len(prompts) == 1 and not (args.json or args.show_depth)

    def write(text: str) -> None:
        if streams:
            print(text, end="", flush=True)

    samples = sample(
        run,
        prompts,
        routing=args.routing,
        slack=args.slack,
        sampling=sampling,
        max_new_tokens=args.tokens,
        stop=[_as_utf8(text) for text in args.stop],
        seed=args.seed,
        write=write,
    )
    if streams:
        return print()
    if args.json:
        fields = ("prompt", "text", "depths", "routed_blocks", "overflow")
        return print_json([{name: getattr(s, name) for name in fields} for s in samples])
    if not args.show_depth:
        return print("\n\n".join(s.prompt + s.text for s in samples))
    console = Console()  # knows NO_COLOR, FORCE_COLOR, TERM and pipes
    in_colour = console.color_system is not None and not console.no_color
    print("\n\n".join(coloured(s) if in_colour else numbered(s) for s in samples))


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        require(args.prompt != "", "--prompt", args.prompt, "is empty: give at least one character")
        return [_as_utf8(args.prompt)]
    try:
        content = read_file(args.prompts, MOST_PROMPTS).decode()
        lines = io.StringIO(content, newline=None).read().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError("--prompts", str(args.prompts), f"cannot be read: {why}") from error
    require(
        all(lines),
        "--prompts",
        str(args.prompts),
        "must hold one prompt a line, none of them empty",
    )
    return lines


def _as_utf8(argument: str) -> str:
    """Returns an argument whose bytes are UTF-8, though the locale's encoding does not know them.

    Python decodes such bytes to surrogates one by one.
    """
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return argument
