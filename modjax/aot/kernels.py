"""Kernels of a compiled program, and lower bounds on their cycles."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from modjax.aot.cost import part_of
from modjax.aot.hlo import Array, Instruction
from modjax.aot.program import Program
from modjax.kernels.schedule import Blocks, Kernel, bound, schedules


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
            blocks = _blocks(program, computation, one)
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


def _blocks(program: Program, computation: str, one: Instruction) -> Blocks | None:
    """Returns what the mask of a splash attention leaves; None without one.

    Its first two operands are constants: the next block of each, and the kind of each, which is 0
    for a block that is hidden whole.
    """
    constants = [program.constant(computation, name) for name in one.operands[:2]]
    if len(constants) < 2 or any(constant is None for constant in constants):
        return None
    following, mask = constants
    assert following is not None and mask is not None
    dims = mask.arrays[0].dims
    kinds = [int(kind) for kind in re.findall(r"-?\d+", mask.text.partition("),")[0])]
    if (
        len(dims) != 3
        or following.arrays != mask.arrays
        or len(kinds) != dims[0] * dims[1] * dims[2]
    ):
        return None
    width = dims[1] if "dkv" in one.name else dims[2]
    return Blocks(sum(kind != 0 for kind in kinds) / len(kinds), width)
