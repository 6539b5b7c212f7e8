"""Kernels of a compiled program, and lower bounds on their cycles."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from modjax.aot.cost import part_of
from modjax.aot.hlo import Array, Instruction
from modjax.aot.program import Program
from modjax.kernels.schedule import Blocks, Kernel, blocks_of, bound, schedules


class Bounded(NamedTuple):
    """A kernel of a program.

    times: how often it runs in a step.
    cycles: lower bound on one run, or None if its schedule tells none.
    """

    name: str
    part: str
    times: float
    cycles: float | None


def kernels_of(program: Program, topology: str, chip: str) -> list[Bounded]:
    """Returns the kernels of a program compiled for a topology, those that take longest first.

    The program's text must contain its large constants, among them the masks of attention.
    """
    found: dict[tuple[str, str, Kernel, Blocks | None], float] = {}
    for computation, one, times in program.executed():
        if one.kernel is not None:
            blocks = _mask(program, computation, one)
            inside = program.computations[computation]
            operands = [inside[name].arrays[0] for name in one.operands]
            key = one.kernel, part_of(one.op_name), _kernel(operands, one), blocks
            found[key] = found.get(key, 0.0) + times
    distinct = list(dict.fromkeys(kernel for _, _, kernel, _ in found))
    texts = dict(zip(distinct, schedules(distinct, topology) if distinct else [], strict=True))
    bounded = [
        Bounded(name, part, times, bound(texts[kernel], chip, blocks) if texts[kernel] else None)
        for (name, part, kernel, blocks), times in found.items()
    ]
    return sorted(bounded, key=lambda one: -one.times * (one.cycles or 0))


def text_of(executable: Any) -> str:
    """Returns the text of a compiled program, with its large constants where jaxlib prints them."""
    try:
        from jaxlib import _hlo  # type: ignore[attr-defined]

        options = _hlo.HloPrintOptions()
        options.print_large_constants = True
        (module,) = executable.runtime_executable().hlo_modules()
        return module.to_string(options)
    except (ImportError, AttributeError, TypeError):  # another release of jaxlib
        return executable.as_text()


def _kernel(operands: Sequence[Array], one: Instruction) -> Kernel:
    start = one.text.index("backend_config=") + len("backend_config=")
    settings, _ = json.JSONDecoder().raw_decode(one.text, start)
    config = json.dumps(settings["custom_call_config"])
    return Kernel(tuple(operands), one.arrays, config)


def _mask(program: Program, computation: str, one: Instruction) -> Blocks | None:
    """Returns what the mask of a kernel leaves; None without one.

    A mask is the second operand, a constant. The first has the same shape.
    """
    constants = [program.constant(computation, name) for name in one.operands[:2]]
    if len(constants) < 2 or constants[0] is None or constants[1] is None:
        return None
    (first,), (mask,) = (constant.arrays for constant in constants if constant)
    kinds = re.findall(r"-?\d+", constants[1].text.partition("),")[0])
    if first.dims != mask.dims or len(kinds) != math.prod(mask.dims):
        return None
    return blocks_of(one.name, list(map(int, kinds)), mask.dims)
