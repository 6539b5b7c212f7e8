"""The time of a compiled program by part, and the data that it sends between devices.

The parts of a model are the names of `jax.named_scope` around its operations.
"""

import re
from typing import NamedTuple

from modjax.aot.hlo import Instruction
from modjax.aot.program import Program

PARTS = (
    "attention",
    "projections",
    "rotary",
    "mlp",
    "experts",
    "router",
    "top_k",
    "gather",
    "scatter",
    "norm",
    "embedding",
    "logits",
    "loss",
    "optimizer",
)
OTHER = "other"
# Operations whose time the compiler does not estimate, alone or in a fusion.
UNESTIMATED = {"sort", "gather", "scatter"}


class Collective(NamedTuple):
    """Collectives of one type and cause.

    count: how many run in a step.
    bytes: of the whole arrays, per device and step.
    cause: the pass and the part of the model.
    """

    kind: str
    count: float
    bytes: float
    cause: str


class Unestimated(NamedTuple):
    """Operations that have no estimate. count: how many run in a step."""

    what: str
    part: str
    count: float


def part_of(op_name: str) -> str:
    """Returns the innermost part of the model that an operation belongs to, or OTHER.

    The last component of its name is the primitive, which may be called like a part.
    """
    for component in reversed(op_name.split("/")[:-1]):
        name = re.fullmatch(r"(?:(?!jit\()\w+\()*(\w+)\)*", component)
        if name is not None and name[1] in PARTS:
            return name[1]
    return OTHER


def cause_of(op_name: str) -> str:
    """Returns the pass of a train step, "" for its update, and the part that an operation is of."""
    passes = {"rematted_computation": "recomputed ", "transpose(": "backward ", "jvp(": "forward "}
    return next((p for mark, p in passes.items() if mark in op_name), "") + part_of(op_name)


def cycles_by_part(program: Program) -> dict[str, float]:
    """Returns the estimated cycles of each part, largest first."""
    found: dict[str, float] = {}
    for _, one, times in program.executed():
        if one.cycles:
            part = part_of(one.op_name)
            found[part] = found.get(part, 0.0) + one.cycles * times
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unestimated(program: Program) -> list[Unestimated]:
    """Returns the operations without an estimate, most frequent first.

    Collectives and kernels are not among them: see `collectives` and `kernels_of`.
    """
    found: dict[tuple[str, str], float] = {}
    for _, one, times in program.executed():
        for what in _without_estimate(program, one) if one.cycles is None else ():
            key = what, part_of(one.op_name)
            found[key] = found.get(key, 0.0) + times
    return sorted((Unestimated(*key, n) for key, n in found.items()), key=lambda one: -one.count)


def _without_estimate(program: Program, one: Instruction) -> set[str]:
    inside = program.within({one.name: one}) if one.opcode == "fusion" else (one,)
    return {inner.opcode for inner in inside} & UNESTIMATED


def collectives(program: Program) -> list[Collective]:
    """Returns the collectives of a step by type and cause, most bytes first.

    The steps of an asynchronous collective share its channel, and count once.
    """
    channels: dict[object, tuple[float, str, float, str]] = {}
    for computation, one, times in program.executed(fused=True):
        kind = one.collective
        if kind is None:
            continue
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        operands = (program.computations[computation].get(name) for name in one.operands)
        moved = max(_bytes(one), sum(operand.bytes for operand in operands if operand is not None))
        channel = (computation, one.name) if one.channel is None else one.channel
        cause = cause_of(one.op_name)
        earlier = channels.get(channel, (0.0, "", 0.0, ""))
        channels[channel] = max(earlier, (times, kind, times * moved, cause))
    totals: dict[tuple[str, str], Collective] = {}
    for count, kind, moved, cause in channels.values():
        total = totals.get((kind, cause), Collective(kind, 0.0, 0.0, cause))
        more = {"count": total.count + count, "bytes": total.bytes + moved}
        totals[kind, cause] = total._replace(**more)
    return sorted(totals.values(), key=lambda one: -one.bytes)


def _bytes(one: Instruction) -> int:
    """Returns the bytes of a collective's results. Starts list their operands first."""
    arrays = [array for array in one.arrays if array.dims]
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(array.bytes for array in arrays)
