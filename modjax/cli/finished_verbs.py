"""The verbs that open finished runs and pretrained models: eval, sample, score and export.

Imports are inside the functions, so that each verb imports only what it needs.
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modjax.backend import start, starting
from modjax.cli.verbs import RUNS_FAILED, json_text
from modjax.errors import InputError, require
from modjax.files import read_file, reason
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.finished.runs import Comparison
    from modjax.finished.text import Sample, Speaker

MOST_TOKENS = 1_000_000  # caches for all of them are allocated at once
MOST_PROMPTS = 16 * 2**20  # bytes of a file of prompts


def _prepare(args: argparse.Namespace) -> None:
    """Checks --slack, starts jax and imports the modules of --imports, before reading any run."""
    from modjax.specs.imports import places

    slack = vars(args).get("slack")
    finite = slack is None or 0 < slack < math.inf
    require(finite, "--slack", slack, "must be greater than 0, and finite")
    start(places(args.imports, Path(), "--imports"))


def _check_code(args: argparse.Namespace, spec: RunSpec) -> None:
    from modjax.provenance import require_readable
    from modjax.records import run_dir

    if not args.other_code:
        require_readable({run_dir(args.workdir, spec.run_id): spec.model})


def evaluate(args: argparse.Namespace) -> int:
    _prepare(args)
    with starting():
        from modjax.finished.runs import choose, compare, open_run

    specs, failures = choose(args.workdir, args.run, routed=True)
    causal = args.slack is None or args.routing != "trained"
    accepted = "needs a routing that never looks ahead; training uses exactly its capacity"
    require(causal, "--slack", args.slack, accepted)
    if args.run is None:  # a sweep may hold models that have not learned this routing
        specs = [s for s in specs if args.routing in s.model.routings] or specs
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
    if not found and len(set(map(str, failures.values()))) == 1:  # such as missing data
        raise next(iter(failures.values()))
    if args.json:
        print(json_text([_as_dicts(comparison) for comparison in found]))
    for run_id, why in failures.items():
        print(f"modjax: failed: {run_id}: {why}", file=sys.stderr)
    return RUNS_FAILED if failures else 0


def _comparison_text(found: "Comparison") -> str:
    from modjax.cli.tables import layers_text
    from modjax.scaling.formatting import count

    bound = "" if found.slack is None else f", cache slots for {found.slack:g} times the capacity"
    gap = found.difference
    header = (
        f"{found.run_id}\n"
        f"trained {found.trained.loss:.4f}   {found.routing} {found.causal.loss:.4f}   "
        f"difference {gap.loss:+.4f} +- {gap.sem:.4f} ({gap.loss / found.trained.loss:+.2%}) over "
        f"{count(gap.tokens)} tokens{bound}"
    )
    return f"{header}\n{layers_text(found.layers)}\n"


def _as_dicts(value: Any) -> Any:
    if hasattr(value, "_asdict"):  # a named tuple
        value = value._asdict()
    return {k: _as_dicts(v) for k, v in value.items()} if isinstance(value, dict) else value


def sample(args: argparse.Namespace) -> None:
    _prepare(args)
    with starting():
        from modjax.decoding.generate import Sampling
        from modjax.finished.text import SampleRequest, sample
        from modjax.nn import unstack

    request = SampleRequest(
        prompts=_prompts(args),
        max_new_tokens=args.tokens,
        stop=[_as_utf8(text) for text in args.stop],
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        routing=args.routing,
        slack=args.slack,
        seed=args.seed,
    )
    require(args.tokens > 0, "--tokens", args.tokens, "must be greater than 0")
    require(args.tokens <= MOST_TOKENS, "--tokens", args.tokens, f"must be at most {MOST_TOKENS}")
    # JAX would silently take the lower 32 bits.
    require(0 <= args.seed < 2**32, "--seed", args.seed, "must be 0 or more, and below 2**32")
    speaker = _open_speaker(args, args.routers)
    # Unstacked once, rather than for every part of the stream.
    graphdef, weights = unstack(speaker.graphdef, speaker.weights)
    speaker = speaker._replace(graphdef=graphdef, weights=weights)
    streams = len(request.prompts) == 1 and not (args.json or args.show_depth)

    def write(text: str) -> None:
        if streams:
            print(text, end="", flush=True)

    samples = sample(speaker, request, write)
    if streams:
        print()
    elif args.json:
        fields = ("prompt", "text", "depths", "routed_blocks", "overflow")
        print(json_text([{name: getattr(s, name) for name in fields} for s in samples]))
    elif args.show_depth:
        _print_depths(samples)
    else:
        print("\n\n".join(s.prompt + speaker.between + s.text for s in samples))


def score(args: argparse.Namespace) -> None:
    _prepare(args)
    with starting():
        from modjax.cli.tables import scores_text
        from modjax.data.prepare.documents import text_documents
        from modjax.finished import score
        from modjax.finished.tasks import read_task

    limit = args.limit
    require(limit is None or limit > 0, "--limit", limit, "must be greater than 0")
    tasks = {path: read_task(path, limit) for path in args.tasks}
    texts = {path: [d.text for d in islice(text_documents([path]), limit)] for path in args.text}
    found, bases, files, width = [], {}, {}, args.seq_len if texts else None
    for routers in args.routers or [None]:
        speaker = _open_speaker(args, routers)
        if not files:  # all models of a base have its tokenizer
            files |= {str(p): score.text_units(speaker, p, texts[p], args.seq_len) for p in texts}
            files |= {str(p): [score.task_unit(speaker, d) for d in tasks[p]] for p in tasks}
        scores = score.score(speaker, files, args.routing, width, bases)
        found += [one._replace(routers=routers and str(routers)) for one in scores]
    print(json_text(list(map(_as_dicts, found))) if args.json else scores_text(found))


def _open_speaker(args: argparse.Namespace, routers: Path | None) -> "Speaker":
    """Opens the model of a verb: a finished run, or a pretrained model, which may have routers."""
    from modjax.finished.text import of_pretrained, of_run

    if args.pretrained is None:
        from modjax.finished.runs import open_run

        accepted = "needs --pretrained: a run has no chat template"
        require(not args.chat, "--chat", args.chat, accepted)
        require(routers is None, "--routers", str(routers), "needs --pretrained")
        return of_run(
            open_run(_choose_one(args, args.routing), workdir=args.workdir, data_dir=args.data_dir)
        )
    from modjax.pretrained import from_pretrained

    require(args.run is None, "--run", args.run, "cannot be combined with --pretrained")
    found = from_pretrained(args.pretrained, routers=routers)
    parts = (found.spec, found.graphdef, found.weights, found.tokenizer)
    return of_pretrained(*parts, chat=args.chat)


def _choose_one(args: argparse.Namespace, routing: str | None) -> RunSpec:
    """Returns the spec of the chosen run, after checking its code and any routing to sample by."""
    from modjax.finished.runs import choose
    from modjax.finished.text import check_routing

    specs, failures = choose(args.workdir, args.run)
    if failures:  # one of these may be the intended run
        raise next(iter(failures.values()))
    spec = specs[-1]
    if routing is not None:
        check_routing(spec.model, routing)
    accepted = f"must name one of the {len(specs)} finished runs, such as {spec.run_id}"
    require(len(specs) == 1, "--run", args.run, accepted)
    _check_code(args, spec)
    return spec


def export(args: argparse.Namespace) -> None:
    _prepare(args)
    with starting():
        from modjax.finished.export import export
        from modjax.finished.runs import load
        from modjax.records import read_record, run_dir
        from modjax.scaling.workdir import read_plan

    if args.pretrained is not None:
        from modjax.pretrained import from_pretrained, save_pretrained

        require(args.run is None, "--run", args.run, "cannot be combined with --pretrained")
        spec, _, weights, tokenizer, config = from_pretrained(args.pretrained)
        about = {"config": config, "tokenizer": tokenizer, "dtype": args.dtype}
        save_pretrained(args.out, spec, weights, **about)
        print(args.out)
        return
    spec = _choose_one(args, None)
    folder = run_dir(args.workdir, spec.run_id)
    record, plan = read_record(folder, spec.run_id), read_plan(args.workdir)
    assert record is not None
    about = {"imports": args.imports, "other_code": args.other_code}
    try:
        run = load(folder, data_dir=args.data_dir, **about)
    except InputError as error:
        if error.field != "data":
            raise
        print(f"modjax: exported without a tokenizer: {error}", file=sys.stderr)
        run = load(folder, **about)
    command = "not recorded" if plan is None else plan.command
    export(run, record, args.out, dtype=args.dtype, command=command)
    print(args.out)


def _print_depths(samples: "Sequence[Sample]") -> None:
    from rich.console import Console

    from modjax.cli.depths import coloured, numbered

    console = Console()  # respects NO_COLOR, FORCE_COLOR, TERM and pipes
    show = coloured if console.color_system is not None and not console.no_color else numbered
    print("\n\n".join(map(show, samples)))


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        require(args.prompt != "", "--prompt", args.prompt, "is empty: give at least one character")
        return [_as_utf8(args.prompt)]
    path = str(args.prompts)
    try:
        content = read_file(args.prompts, MOST_PROMPTS).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError("--prompts", path, f"cannot be read: {why}") from error
    lines = io.StringIO(content, newline=None).read().removesuffix("\n").split("\n")
    require(all(lines), "--prompts", path, "must hold one prompt a line, none of them empty")
    return lines


def _as_utf8(argument: str) -> str:
    """Returns an argument decoded as UTF-8 under any locale.

    Python decodes each byte that the locale does not know to a surrogate; this restores the bytes.
    """
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return argument
