"""Runs compiled for devices that are not there: the verb, its text, and columns of a plan."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modjax.backend import start, starting
from modjax.cli import verbs
from modjax.scaling.formatting import clock, count
from modjax.scaling.report.terminal import text_table

if TYPE_CHECKING:
    from modjax.aot.memory import Buffer
    from modjax.aot.report import Report
    from modjax.scaling.plan.experiment import Experiment
    from modjax.scaling.plan.plan_table import PlannedRun

GIB = 2**30


def aot(args: argparse.Namespace) -> int:
    experiment = verbs.experiment_of(args)
    spec = verbs.choose(args, experiment.specs)
    _start()
    from modjax.aot.compile import compile_step, too_large
    from modjax.aot.report import plain, report_on

    _say(f"compiling {spec.run_id} for {args.topology} ...")
    execution, sizes = experiment.execution, (args.topology, args.slices)
    compiled = compile_step(spec, execution, *sizes, decode=args.decode)
    report = report_on(compiled)
    print(verbs.json_text(plain(report)) if args.json else report_text(report))
    if not report.memory.fits:
        raise too_large(args.topology, "it takes", report.memory.total, compiled.chip)
    return 0


def with_fits(
    args: argparse.Namespace, experiment: "Experiment", cells: "Sequence[PlannedRun]"
) -> "list[PlannedRun]":
    """Returns the rows of a plan with memory and time of their train steps on --topology."""
    _start()
    from modjax.aot.plan import fits_of

    found = fits_of(experiment.specs, experiment.execution, args.topology, args.slices, _say)
    rows = []
    for cell in cells:
        fit = found[cell.run_id]
        flags = (*cell.flags, *([] if fit.fits else ["does not fit"]))
        sizes = {"bytes_per_chip": fit.memory, "step_seconds": fit.step_seconds}
        rows.append(dataclasses.replace(cell, flags=flags, **sizes))
    return rows


def _start() -> None:
    """Starts jax on the CPU: the devices to compile for are described, and need not be there."""
    # Nor can jax read their programs from a cache.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start()
    with starting():
        import jax

        jax.devices()


def _say(line: str) -> None:
    print(f"modjax: {line}", file=sys.stderr, flush=True)


def report_text(report: "Report") -> str:
    """Returns the report as tables. Everything about time in it is called an estimate."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    remat = f", remat {report.remat}" if report.remat else ""
    slices = f"{report.slices} x " if report.slices > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    head = (
        f"{report.run_id}: {report.what} on {slices}{report.topology}, {report.devices} chips "
        f"({mesh or 'one device'}{remat}), compiled in {clock(report.compile_seconds)} ({versions})"
    )
    tables = [head, _memory_text(report), _time_text(report)]
    if report.unestimated:
        rows = [(one.what, one.part, f"{one.count:g}") for one in report.unestimated]
        tables.append(text_table(("without an estimate", "part", "times"), rows, left=2))
    if report.collectives:
        rows = [
            (one.kind, one.cause, f"{one.count:g}", f"{one.bytes / 1e9:.3f}")
            for one in report.collectives
        ]
        header = ("collective", "cause", "times", "GB per device")
        tables.append(text_table(header, rows, left=2))
    if report.unknown:
        tables.append("loops of unknown length, counted once: " + ", ".join(report.unknown))
    return "\n\n".join(tables)


def _memory_text(report: "Report") -> str:
    memory = report.memory

    def row(what: str, size: float, shape: str = "") -> tuple[str, str, str]:
        return what, f"{size / GIB:.2f}", shape

    def rows(buffers: "list[Buffer]") -> list[tuple[str, str, str]]:
        return [
            row(f"  {b.what}", b.bytes, f"{b.count} x {b.shape}" if b.shape else "")
            for b in buffers
        ]

    share = f"{memory.total / memory.available:.0%} of {memory.available / GIB:.2f}"
    body = [
        row("arguments", memory.arguments),
        *rows(report.inputs),
        row("temporaries", memory.temporaries, "largest arrays, named by shape; not all at once"),
        *rows(report.temporaries),
        row("outputs that replace no argument", memory.outputs),
        row("total", memory.total, f"{share}: {'fits' if memory.fits else 'DOES NOT FIT'}"),
        row("code, not in the total", memory.code),
    ]
    cells = [(what, size) for what, size, _ in body]
    lines = text_table(("memory per chip", "GiB"), cells).splitlines()
    notes = ["", *(note for *_, note in body)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))


def _time_text(report: "Report") -> str:
    total = report.total_cycles + report.kernel_cycles
    parts = [*report.cycles.items()]
    if report.kernels:
        parts.append(("kernels, at least", report.kernel_cycles))
    rows = [(part, count(cycles), f"{cycles / total:.1%}") for part, cycles in parts]
    rows.append(("sum", count(total), f"{report.seconds * 1e3:.1f} ms"))
    lines = [text_table(("estimated cycles", "", "share"), rows)]
    if report.kernels:
        bounds = [
            (
                one.name,
                one.part,
                f"{one.times:g}",
                "none" if one.cycles is None else count(one.cycles),
            )
            for one in report.kernels
        ]
        header = ("kernel", "part", "times", "cycles each, bounded from its schedule")
        lines += ["", text_table(header, bounds, left=2), ""]
    shares = {"": report.share_with_kernels}
    if report.kernels:
        shares[", without the time of kernels"] = report.share
    for note, share in shares.items():
        if share is not None:
            lines.append(
                f"estimated share of peak{note}: {share.causal:.3f} by causal FLOPs "
                f"({report.flops['causal']:.4g} a step), {share.full:.3f} by all "
                f"({report.flops['full']:.4g})"
            )
    if report.token_seconds is not None:
        lines.append(
            f"estimated time of a token of each sequence: {report.token_seconds * 1e3:.3f} ms; to "
            f"read all arguments once takes {report.read_seconds * 1e3:.3f} ms"
        )
    lines.append(f"XLA's own count, loop bodies once: {report.flops['xla']:.4g} FLOPs per chip")
    return "\n".join(lines)
