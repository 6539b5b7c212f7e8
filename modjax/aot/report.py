"""The report on a compiled program: memory, time, FLOPs and communication. Time is estimated."""

import importlib.metadata
from typing import Any, NamedTuple

from modjax.aot.compile import Compiled
from modjax.aot.cost import (
    Collective,
    Unestimated,
    collectives,
    cycles_by_part,
    unestimated,
)
from modjax.aot.hlo import Program
from modjax.aot.memory import Buffer, Memory, inputs, memory_of, temporaries
from modjax.flops import causal_train_flops, train_flops

MOST_BUFFERS = 8


class Share(NamedTuple):
    """Share of the chips' peak that a train step reaches, by the compiler's estimate.

    full, causal: by all FLOPs of modjax.flops, and by those with half of scores and values.
    """

    full: float
    causal: float


class Report(NamedTuple):
    """What the compiler says about a program. All times are its estimates.

    run_id, what: the run, and the program.
    mesh: sizes of the mesh's axes.
    inputs, temporaries: largest arrays per device; temporaries are named by their shapes.
    flops: of the whole step: "full" and "causal" (none for decoding), and by XLA's own count per
      device, in which the body of a loop runs once.
    cycles: estimated cycles by part of the model.
    seconds: estimated time of the program.
    share: None for decoding.
    unknown: loops that count once, because the text does not tell their trips.
    """

    run_id: str
    what: str
    topology: str
    slices: int
    chip: str
    devices: int
    mesh: dict[str, int]
    memory: Memory
    inputs: list[Buffer]
    temporaries: list[Buffer]
    flops: dict[str, float]
    cycles: dict[str, float]
    seconds: float
    share: Share | None
    unestimated: list[Unestimated]
    collectives: list[Collective]
    unknown: list[str]
    compile_seconds: float
    versions: dict[str, str]

    @property
    def total_cycles(self) -> float:
        return sum(self.cycles.values())


def report_on(compiled: Compiled, topology: str, slices: int = 1) -> Report:
    """Returns the report on a program of `compile_step`."""
    program = Program(compiled.executable.as_text())
    cycles, chip, devices = cycles_by_part(program), compiled.chip, compiled.mesh.size
    flops = _flops(compiled)
    total = sum(cycles.values())
    assert chip.flops_per_cycle is not None
    most = devices * total * chip.flops_per_cycle
    trains = "causal" in flops and most > 0
    return Report(
        run_id=compiled.spec.run_id,
        what=compiled.what,
        topology=topology,
        slices=slices,
        chip=chip.name,
        devices=devices,
        mesh=dict(compiled.mesh.shape),
        memory=memory_of(compiled),
        inputs=inputs(compiled),
        temporaries=temporaries(compiled, program)[:MOST_BUFFERS],
        flops=flops,
        cycles=cycles,
        seconds=total / chip.clock,
        share=Share(flops["full"] / most, flops["causal"] / most) if trains else None,
        unestimated=unestimated(program),
        collectives=collectives(program),
        unknown=program.unknown,
        compile_seconds=compiled.seconds,
        versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu", "modjax")},
    )


def _flops(compiled: Compiled) -> dict[str, float]:
    counted = {"xla": float(compiled.executable.cost_analysis().get("flops", 0.0))}
    model, train = compiled.spec.model, compiled.spec.train
    if "batch" not in compiled.inputs:
        return counted
    size = train.seq_len, train.batch_size
    return counted | {
        "full": train_flops(model, *size, trained=train.trained),
        "causal": causal_train_flops(model, *size, trained=train.trained),
    }


def plain(report: Report) -> dict[str, Any]:
    """Returns the report as plain data, for JSON."""
    values = report._asdict()
    for name in ("inputs", "temporaries", "unestimated", "collectives"):
        values[name] = [one._asdict() for one in values[name]]
    values["memory"] = report.memory._asdict() | {
        "total": report.memory.total,
        "fits": report.memory.fits,
    }
    values["share"] = report.share and report.share._asdict()
    values["total_cycles"] = report.total_cycles
    return values
