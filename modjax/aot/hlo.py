"""The text of a compiled program: its computations and their instructions."""

import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)", re.DOTALL)
_TYPED = re.compile(r"(\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(\w+)=(%[\w.\-]+|\{%[^}]*\})")
_NAMED = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_FAST = re.compile(r"S\([1-9]\d*\)")  # a memory space other than the main one


class Array(NamedTuple):
    """Shape of an array. main: whether it lies in the main memory of the device."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        count = 1
        for dim in self.dims:
            count *= dim
        return -(-count * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """An instruction of a computation.

    arrays: its results, flat.
    operands: names of its operands.
    called: attribute, such as "body" -> names of the computations that it calls.
    cycles: the compiler's estimate, or None.
    op_name: the operation of the traced function that it comes from.
    text: everything after the opcode.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    cycles: int | None
    op_name: str
    channel: int | None
    root: bool
    text: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def kernel(self) -> str | None:
        """The name of the kernel, written by hand, that runs here."""
        written = self.opcode == "custom-call" and '"custom_call_config"' in self.text
        return re.sub(r"(\.\d+)+$", "", self.name) if written else None

    @property
    def collective(self) -> str | None:
        """The name of the collective that starts or runs here, without "-start"."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None


Computation = dict[str, Instruction]  # by name, in the order of execution


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program by name, and the name of the one that runs first."""
    computations, entry = {}, ""
    for name, runs_first, lines in _split(text):
        computations[name] = {one.name: one for one in map(_instruction, lines)}
        entry = name if runs_first else entry
    return computations, entry


def _split(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yields each computation: its name, whether it is the entry, and its instructions.

    An instruction may take several lines, some of which begin with "}".
    """
    header, found = None, []
    for line in text.splitlines():
        if header is None:
            header, found = _HEADER.match(line), []
        elif line == "}":
            yield header[2], bool(header[1]), found
            header = None
        elif _INSTRUCTION.match(line):
            found.append(line)
        elif found:
            found[-1] += line


def arrays_of(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type, flat."""
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), not _FAST.search(layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction:
    """Returns the instruction of one (joined) line."""
    root, name, rest = _INSTRUCTION.match(line).groups()  # type: ignore[union-attr]
    typed = _TYPED.match(rest)
    assert typed is not None, line[:200]
    text = rest[typed.end() :]
    operands, _, attributes = text.partition("), ") if "), " in text else (text, "", "")
    cycles, op_name, channel = (p.search(attributes) for p in (_CYCLES, _OP_NAME, _CHANNEL))
    return Instruction(
        name,
        typed[2],
        arrays_of(typed[1]),
        tuple(_NAMED.findall(operands)),
        {key: tuple(_NAMED.findall(names)) for key, names in _CALLED.findall(attributes)},
        int(cycles[1]) if cycles else None,
        op_name[1] if op_name else "",
        int(channel[1]) if channel else None,
        root is not None,
        text,
    )
