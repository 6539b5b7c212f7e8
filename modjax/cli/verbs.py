"""The verbs of the command line: each calls a package and prints what it returns.

Imports are inside the functions, so that each verb imports only what it needs.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modjax.backend import check_xla_starts, start, starting
from modjax.errors import InputError, Preempted, require
from modjax.specs import RunSpec, to_dict

BAD_INPUT, RUNS_FAILED, FAULT, STOPPED, INTERRUPTED = 2, 3, 70, 75, 130


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1)


def prepare(args: argparse.Namespace) -> None:
    from modjax.data.prepare.prepare import prepare

    path = prepare(
        name=args.name,
        text_files=args.text,
        tfds_name=args.tfds,
        vocab=args.vocab,
        tokenizer=args.tokenizer,
        data_dir=args.data_dir,
        force=args.force,
    )
    print(path)


def show(args: argparse.Namespace) -> None:
    from modjax.cli.tables import data_text
    from modjax.data.manifest import Manifest
    from modjax.data.token_cache import list_caches

    caches = list_caches(args.data_dir)
    manifests = [one for one in caches if isinstance(one, Manifest)]
    for unreadable in caches:
        if not isinstance(unreadable, Manifest):
            print(f"modjax: {unreadable}", file=sys.stderr)
    if args.json:
        print(json_text([to_dict(manifest) for manifest in manifests]))
    elif manifests or not caches:
        print(data_text(manifests) if manifests else f"nothing is prepared in {args.data_dir}")


def experiment_of(args: argparse.Namespace) -> Any:
    from modjax.scaling.plan.experiment import load

    return load(args.config, args.overrides, args.command)


def _load_sweep(args: argparse.Namespace) -> Any:
    experiment = experiment_of(args)
    accepted = "has no `sweep` group: `modjax train` runs it"
    require(experiment.sweep is not None, "--config", args.config, accepted)
    return experiment


def plan(args: argparse.Namespace) -> int:
    from modjax.cli.tables import plan_text
    from modjax.records import Scan, scan, warn_left_out
    from modjax.scaling.fit.results import to_json
    from modjax.scaling.plan.prediction import NOISE
    from modjax.scaling.sweep import open_data, plan_table

    experiment, jobs = _load_sweep(args), 1 if args.jobs is None else args.jobs
    require(jobs > 0, "--jobs", jobs, "must be greater than 0")
    cache, unread = None, None
    try:
        cache = open_data(experiment, args.data_dir)
    except InputError as error:  # a plan may be made before its data is prepared
        unread = error
    found = scan(args.workdir) if args.workdir else Scan([], {})
    warn_left_out(found.left_out)
    noise = NOISE if args.noise is None else args.noise
    cells = plan_table(experiment, cache, found.records, noise)
    if args.topology is not None:
        from modjax.cli.aot import with_fits

        cells = with_fits(args, experiment, cells)
    print(json_text(list(map(to_json, cells))) if args.json else plan_text(cells, jobs))
    if unread is None:
        return 0
    print(f"modjax: epochs unknown: {unread}", file=sys.stderr)
    return BAD_INPUT


def check(args: argparse.Namespace) -> int:
    from modjax.cli.tables import claims_text

    specs = experiment_of(args).specs
    start()
    with starting():
        import jax

        from modjax.checks.look_ahead import broken
        from modjax.checks.runs import probed

        jax.devices()
    findings = probed(specs)
    values = [f._asdict() | {"leak": f.leak and f.leak._asdict()} for f in findings]
    print(json_text(values) if args.json else claims_text(findings))
    errors = [error for error in map(broken, findings) if error is not None]
    for error in errors:
        print(f"modjax: {error}", file=sys.stderr)
    return BAD_INPUT if errors else 0


def sweep(args: argparse.Namespace) -> int:
    from modjax.scaling.engines.engine import options_of
    from modjax.scaling.sweep import check, open_data
    from modjax.specs.imports import import_all, places

    import_all(places(args.imports, Path(), "--imports"), "--imports")
    experiment = _load_sweep(args)
    jobs = {} if args.jobs is None else {"jobs": str(args.jobs)}
    name, values = args.engine or experiment.engine.get("name", "local"), {}
    if name == experiment.engine.get("name"):
        values = {field: v for field, v in experiment.engine.items() if field != "name"}
    engine = options_of(name, jobs | args.engine_options, values)
    cache = open_data(experiment, args.data_dir)
    check(experiment, cache)
    return run_plan(args, experiment, cache.manifest.fingerprint, engine)


def train(args: argparse.Namespace) -> int:
    from modjax.scaling.sweep import open_data

    experiment = experiment_of(args)
    spec = choose(args, experiment.specs)
    fingerprint = open_data(experiment, args.data_dir).manifest.fingerprint
    if spec.base is not None:
        say_new_weights(spec)
    if args.distributed:
        data = {"data_dir": args.data_dir, "fingerprint": fingerprint}
        return _train_together(args, experiment, spec, data)
    return run_plan(args, experiment, fingerprint, only=spec)


def say_new_weights(spec: RunSpec) -> None:
    """Prints which weights of a run are drawn from its seed, although it starts from a base."""
    with starting():
        from modjax.training.base_weights import new_weights

    alike = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in new_weights(spec))
    if alike:
        new = ", ".join(f"{count} of {name}" for name, count in alike.items())
        print(f"modjax: new weights, not in {spec.base}: {new}", file=sys.stderr)


def run_plan(
    args: argparse.Namespace,
    experiment: Any,
    fingerprint: str,
    engine: Any = None,
    only: RunSpec | None = None,
) -> int:
    """Does a plan, or one run of it, on an engine; None takes one local process."""
    from modjax.cli.tables import outcome_text
    from modjax.scaling.engines.engine import HandedOver
    from modjax.scaling.engines.local import Local
    from modjax.scaling.session import Stopped
    from modjax.scaling.sweep import sweep

    try:
        outcome = sweep(
            experiment,
            workdir=args.workdir,
            data_dir=args.data_dir,
            engine=engine or Local(),
            data_fingerprint=fingerprint,
            only=only,
            other_code=args.other_code,
            lease=getattr(args, "lease", 0.0),
        )
    except Stopped as stopped:
        return _stopped(INTERRUPTED if stopped.is_interrupt else STOPPED, stopped.saved)
    except HandedOver as handed_over:
        print(handed_over)
        return 0
    print(json_text(to_dict(outcome)) if args.json else outcome_text(outcome))
    return RUNS_FAILED if outcome.failures else 0


def _stopped(code: int, saved: bool = True) -> int:
    said = "state saved; the same command continues from here"
    if not saved:
        said = "state not saved; the same command continues from the newest checkpoints"
    print(f"modjax: stopped, {said}", file=sys.stderr)
    return code


def _train_together(args: argparse.Namespace, experiment: Any, spec: RunSpec, data: Any) -> int:
    from modjax.scaling.workers.distributed import train_together

    try:
        record = train_together(experiment, spec, args.workdir, other_code=args.other_code, **data)
    except Preempted:
        return _stopped(STOPPED)
    if record is not None:
        print(json_text(to_dict(record)))
    return 0


def choose(args: argparse.Namespace, specs: Sequence[RunSpec]) -> RunSpec:
    if args.run is None and len(specs) == 1:
        return specs[0]
    for spec in specs:
        if spec.run_id == args.run:
            return spec
    accepted = f"must be one of the plan's {len(specs)} run ids, such as {specs[0].run_id}"
    raise InputError("--run", args.run, accepted)


def stop(args: argparse.Namespace) -> None:
    from modjax.scaling import orders

    orders.stop(args.workdir)


def retry(args: argparse.Namespace) -> None:
    from modjax.scaling import orders

    orders.retry(args.workdir, args.run)


def logs(args: argparse.Namespace) -> None:
    from modjax.scaling import orders

    print(orders.log(args.workdir, args.run), end="")


def status(args: argparse.Namespace) -> None:
    from modjax.cli.tables import status_text
    from modjax.records import warn_left_out
    from modjax.scaling.status import STATES, status

    found = status(args.workdir)
    warn_left_out(found.left_out)
    if args.json:
        counts = {state: found.count(state) for state in STATES}
        print(json_text(counts | dataclasses.asdict(found)))
    else:
        print(status_text(found))


def fit(args: argparse.Namespace) -> None:
    from modjax.provenance import differences
    from modjax.scaling.fit.isoflop import fit_workdir
    from modjax.scaling.fit.results import to_json
    from modjax.scaling.report.terminal import render_text

    found, fits = fit_workdir(args.workdir, args.loss, args.size)
    for difference in differences(found.records):
        print(f"modjax: {difference}", file=sys.stderr)
    print(json_text(to_json(fits)) if args.json else render_text(fits))


def report(args: argparse.Namespace) -> None:
    from modjax.scaling.report.page import report

    print(report(args.workdir, args.loss, args.size))


def flops(args: argparse.Namespace) -> None:
    from modjax.cli.tables import flops_text, flops_values

    experiment = experiment_of(args)
    specs = experiment.specs
    if args.run is None and experiment.sweep is not None:
        largest = [s for s in specs if s.budget_flops == specs[0].budget_flops]
        by_arm = [[s for s in largest if s.variant == arm] for arm in experiment.sweep.arms]
        specs = [of_arm[len(of_arm) // 2] for of_arm in by_arm]  # the middle size
    else:
        specs = [choose(args, specs)]
    values = map(flops_values, specs)
    print(json_text(list(values)) if args.json else "\n\n\n".join(map(flops_text, specs)))


def bench(args: argparse.Namespace) -> None:
    from modjax import bench

    check_xla_starts()
    bench.run(args.name, json=args.json)
