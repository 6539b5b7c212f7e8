"""The report on a compiled program: memory, time, FLOPs and communication. Time is estimated."""

import importlib.metadata
from typing import Any, NamedTuple

from modjax.aot.compile import DRAWN, Compiled
from modjax.aot.cost import (
    Collective,
    Unestimated,
    collectives,
    cycles_by_part,
    unestimated,
)
from modjax.aot.kernels import Bounded, kernels_of, text_of
from modjax.aot.memory import Buffer, Memory, inputs, memory_of, temporaries
from modjax.aot.program import Program
from modjax.flops import causal_train_flops, train_flops
from modjax.kernels.chips import compiler_version

MOST_BUFFERS = 8


class Share(NamedTuple):
    """Share of the chips' peak that a train step reaches, by the compiler's estimate.

    full, causal: by all FLOPs of modjax.flops, and by those with half of scores and values.
    """

    full: float
    causal: float


class Report(NamedTuple):
    """The compiler's account of a program. All times are its estimates.

    run_id, what: the run, and the program.
    mesh: sizes of the mesh's axes. remat: see Compiled.
    inputs, temporaries: largest arrays per device; temporaries are named by their shapes.
    flops: of the whole step: "full" and "causal" (none for decoding), and by XLA's own count per
      device, in which the body of a loop runs once.
    cycles: estimated cycles by part of the model, without kernels.
    kernels: with lower bounds on their cycles.
    kernel_cycles: sum of these bounds.
    seconds: estimated time of the program, kernels at their bounds included.
    token_seconds: the same for a token of each sequence; None for a train step.
    read_seconds: time to read all arguments once, at the bandwidth of the chip's memory.
    share: without the time of kernels; None for decoding.
    share_with_kernels: with the time of kernels at their bounds.
    unknown: loops that count once, because the text does not tell their trips.
    """

    run_id: str
    what: str
    topology: str
    slices: int
    chip: str
    devices: int
    mesh: dict[str, int]
    remat: str
    memory: Memory
    inputs: list[Buffer]
    temporaries: list[Buffer]
    flops: dict[str, float]
    cycles: dict[str, float]
    total_cycles: float
    kernels: list[Bounded]
    kernel_cycles: float
    seconds: float
    token_seconds: float | None
    read_seconds: float
    share: Share | None
    share_with_kernels: Share | None
    unestimated: list[Unestimated]
    collectives: list[Collective]
    unknown: list[str]
    compile_seconds: float
    versions: dict[str, str]


def report_on(compiled: Compiled) -> Report:
    """Returns the report on a program of `compile_step`."""
    program = Program(text_of(compiled.executable))
    chip, flops, cycles = compiled.chip, _flops(compiled), cycles_by_part(program)
    kernels = kernels_of(program, compiled.topology, chip.name)
    total = sum(cycles.values())
    bounds = sum(kernel.times * (kernel.cycles or 0.0) for kernel in kernels)
    memory, seconds = memory_of(compiled), (total + bounds) / chip.clock
    return Report(
        run_id=compiled.spec.run_id,
        what=compiled.what,
        topology=compiled.topology,
        slices=compiled.slices,
        chip=chip.name,
        devices=compiled.mesh.size,
        mesh=dict(compiled.mesh.shape),
        remat=compiled.remat,
        memory=memory,
        inputs=inputs(compiled),
        temporaries=temporaries(compiled, program)[:MOST_BUFFERS],
        flops=flops,
        cycles=cycles,
        total_cycles=total,
        kernels=kernels,
        kernel_cycles=bounds,
        seconds=seconds,
        token_seconds=None if "full" in flops else seconds / DRAWN,
        read_seconds=memory.arguments / chip.bandwidth,
        share=_share(compiled, flops, total),
        share_with_kernels=_share(compiled, flops, total + bounds),
        unestimated=unestimated(program),
        collectives=collectives(program),
        unknown=program.unknown,
        compile_seconds=compiled.seconds,
        versions={name: importlib.metadata.version(name) for name in ("jax", "modjax")}
        | compiler_version(),
    )


def _share(compiled: Compiled, flops: dict[str, float], cycles: float) -> Share | None:
    if "full" not in flops or cycles == 0:
        return None
    most = compiled.mesh.size * compiled.chip.flops * cycles / compiled.chip.clock
    return Share(flops["full"] / most, flops["causal"] / most)


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

    def one(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: one(inner) for name, inner in value._asdict().items()}
        return [one(inner) for inner in value] if isinstance(value, list) else value

    memory = {"total": report.memory.total, "fits": report.memory.fits}
    values = one(report)
    return values | {"memory": values["memory"] | memory}
