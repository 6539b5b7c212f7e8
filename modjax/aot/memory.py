"""The memory of a compiled program, in words.

The sums are the compiler's. It does not say which arrays they consist of: inputs are known from the
state of training, and temporaries are named by their shapes and by the operations that make them.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from modjax.aot.compile import Compiled
from modjax.aot.cost import OTHER, part_of
from modjax.aot.hlo import Array
from modjax.aot.program import VIEWS, Program
from modjax.specs import ModelSpec

SMALLEST = 0.002  # of the chip's memory; smaller arrays are not listed
# Instructions that make no array.
NONE_MADE = (*VIEWS, "parameter", "get-tuple-element", "tuple", "conditional", "constant")


class Memory(NamedTuple):
    """Bytes per device. outputs: those that take no input's place. code: the program itself."""

    arguments: int
    temporaries: int
    outputs: int
    code: int
    available: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool:
        return self.total <= self.available


class Buffer(NamedTuple):
    """Arrays of one kind. shape: "" for inputs, which have many.

    bytes: of all of them, per device.
    """

    what: str
    shape: str
    count: int
    bytes: int


def memory_of(compiled: Compiled) -> Memory:
    """Returns the compiler's account of the memory of each device."""
    found = compiled.executable.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.generated_code_size_in_bytes,
        compiled.chip.memory,
    )


def inputs(compiled: Compiled) -> list[Buffer]:
    """Returns the groups of inputs."""
    found = []
    for name, tree in compiled.inputs.items():
        leaves = jax.tree.leaves(tree)
        sizes = (math.prod(_shard(leaf)) * leaf.dtype.itemsize for leaf in leaves)
        found.append(Buffer(name, "", len(leaves), sum(sizes)))
    return found


def temporaries(compiled: Compiled, program: Program) -> list[Buffer]:
    """Returns the largest temporary arrays, largest sum first.

    Arrays of one kind and size are one entry, whose count is that of the loop that carries most of
    them, or 1. They need not all exist at once.
    """
    least, words = SMALLEST * compiled.chip.memory, _Words(compiled)
    found: dict[tuple[str, str, int], Buffer] = {}
    for arrays, op_name in _arrays(program):
        together: dict[tuple[str, str, int], Buffer] = {}
        for array in arrays:
            if array.main and array.bytes >= least:
                key = words.name(array, op_name), array.dtype, array.bytes
                count = 1 + (together[key].count if key in together else 0)
                together[key] = Buffer(key[0], str(array), count, count * array.bytes)
        for key, buffer in together.items():
            found[key] = max(buffer, found.get(key, buffer), key=lambda one: one.count)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)


def _arrays(program: Program) -> Iterator[tuple[Sequence[Array], str]]:
    """Yields arrays that exist at once, and the operation that makes them. Inputs are left out."""
    for computation, one, _ in program.executed():
        if one.opcode == "while":
            entering = (program.enters(computation, one, i, VIEWS) for i in range(len(one.arrays)))
            made = (source is None or source.opcode != "parameter" for source in entering)
            yield list(itertools.compress(one.arrays, made)), one.op_name
        elif one.opcode not in NONE_MADE and not one.opcode.endswith(("-start", "-done")):
            yield one.arrays, one.op_name


class _Words:
    """Names of arrays by their shapes."""

    def __init__(self, compiled: Compiled):
        model: ModelSpec = compiled.spec.model
        leaves = jax.tree.leaves(compiled.inputs["parameters"])
        self._weights = set()
        for leaf in leaves:
            for dims in (tuple(leaf.shape), _shard(leaf)):
                self._weights |= {_bare(dims), _bare(dims[1:])}
        self._vocab = {model.vocab_size // n for n in (1, compiled.mesh.shape["tensor"])}
        self._repeats = {segment.times for segment in model.segments} - {1}

    def name(self, array: Array, op_name: str) -> str:
        dims = _bare(array.dims)
        if dims in self._weights:
            gradient = "transpose(" in op_name or array.dtype == "f32"
            return "gradients" if gradient else f"parameters as {array.dtype}"
        if self._vocab & set(dims):
            return "logits"
        if array.dims and array.dims[0] in self._repeats and len(array.dims) > 2:
            return "saved activations"
        part = part_of(op_name)
        return "activations" if part == OTHER else f"activations of {part}"


def _bare(dims: Iterable[int]) -> tuple[int, ...]:
    """Returns the dims other than 1, in order of size: layouts and orders of products vary."""
    return tuple(sorted(dim for dim in dims if dim > 1))


def _shard(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.sharding.shard_shape(leaf.shape))
