"""The text of a compiled program: its instructions, and how often each runs.

The compiler prints an estimate of cycles beside most instructions. It prints no trip counts, so
they are derived from the condition, the step and the start of each loop.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that pass on a value.
ALIASES = ("bitcast", "copy", "copy-start", "copy-done", "convert", "opt-barrier")

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


class Program:
    """A compiled program, parsed from its text.

    computations: name -> instructions.
    entry: name of the computation that runs first.
    unknown: loops whose trips the text does not tell; they count as one trip.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for name, entry, lines in _split(text):
            instructions = map(_instruction, lines)
            self.computations[name] = {one.name: one for one in instructions}
            self.entry = name if entry else self.entry
        self._cycles: dict[str, float] = {}
        self._trips: dict[str, int | None] = {}

    def executed(self, *, fused: bool = False) -> Iterator[tuple[str, Instruction, float]]:
        """Yields every instruction that runs: its computation, itself, and how often it runs.

        Of a conditional, the branch with more estimated cycles runs.

        fused: also yields the instructions inside fusions.
        """
        return self._visit(self.entry, 1.0, fused)

    @cached_property
    def cycles(self) -> float:
        """Sum of the estimated cycles of all instructions, times how often they run."""
        return self._cycles_of(self.entry)

    @cached_property
    def unknown(self) -> list[str]:
        loops = (one for _, one, _ in self.executed() if one.opcode == "while")
        return [one.op_name or one.name for one in loops if self._trips[one.name] is None]

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """Returns how often the body of a loop runs, or None if the text does not tell."""
        if loop.name not in self._trips:
            self._trips[loop.name] = self._count(computation, loop)
        return self._trips[loop.name]

    def constant(self, computation: str, name: str) -> Instruction | None:
        """Returns the constant that a value is, or None. Looks through copies and loops."""
        found = self.computations[computation].get(name)
        while found is not None and found.opcode in ALIASES:
            found = self.computations[computation].get(found.operands[0])
        if found is None or found.opcode == "constant":
            return found
        if found.opcode == "get-tuple-element":
            index = int(re.findall(r"index=(\d+)", found.text)[0])
            source = self.computations[computation][found.operands[0]]
            while source.opcode in ALIASES:
                source = self.computations[computation][source.operands[0]]
            if source.opcode == "tuple":
                return self.constant(computation, source.operands[index])
            if source.opcode == "parameter" and computation in self._callers:
                outer, loop = self._callers[computation]
                return self._carried(outer, loop, index)
        return None

    def _carried(self, computation: str, loop: Instruction, index: int) -> Instruction | None:
        """Returns the constant that enters a loop at a place of its tuple, or None."""
        entering = self.computations[computation].get(loop.operands[0])
        if entering is None or entering.opcode != "tuple":
            return None
        return self.constant(computation, entering.operands[index])

    @cached_property
    def _callers(self) -> dict[str, tuple[str, Instruction]]:
        """Body of a loop -> the computation of the loop, and the loop."""
        return {
            one.called["body"][0]: (name, one)
            for name, computation in self.computations.items()
            for one in computation.values()
            if one.opcode == "while"
        }

    def _count(self, computation: str, loop: Instruction) -> int | None:
        """Returns (bound - start) / step of a loop whose condition compares a counter."""
        condition = self.computations[loop.called["condition"][0]]
        compared = [one for one in self.within(condition) if one.opcode == "compare"]
        constants = [
            int(value)
            for one in self.within(condition)
            if one.opcode == "constant" and one.arrays[0].dtype in ("s32", "u32")
            for value in re.findall(r"^(\d+)\)", one.text)
        ]
        if len(constants) == 0 or not compared:
            return None
        bound = max(constants)
        counter = self._counter(condition)
        if counter is None:
            return bound
        start = self._carried(computation, loop, counter)
        first = int(_value(start)) if start is not None else 0
        return max(0, -(-(bound - first) // self._step(loop.called["body"][0], counter)))

    def within(self, computation: Computation) -> Iterator[Instruction]:
        """Yields the instructions of a computation, with those of its fusions."""
        for one in computation.values():
            yield one
            for name in one.called.get("calls", ()):
                yield from self.within(self.computations[name])

    def _counter(self, condition: Computation) -> int | None:
        """Returns the place of the loop's counter: the integer that its condition reads."""
        read = [
            int(re.findall(r"index=(\d+)", one.text)[0])
            for one in condition.values()
            if one.opcode == "get-tuple-element" and str(one.arrays[0]) in ("s32[]", "u32[]")
        ]
        return read[0] if len(read) == 1 else None

    def _step(self, body: str, counter: int) -> int:
        """Returns by how much the counter grows in one trip; 1 if the text does not tell."""
        computation = self.computations[body]
        root = next(one for one in computation.values() if one.root)
        if root.opcode != "tuple":
            return 1
        new = computation[root.operands[counter]]
        while new.opcode in ALIASES:
            new = computation[new.operands[0]]
        values = [self.constant(body, operand) for operand in new.operands]
        if new.opcode != "add":
            return 1
        return max(1, *(int(_value(one)) for one in values if one is not None))

    def _visit(
        self, name: str, times: float, fused: bool, op_name: str = ""
    ) -> Iterator[tuple[str, Instruction, float]]:
        for one in self.computations[name].values():
            # What the compiler adds inside a fusion has no name of its own.
            one = one if one.op_name else one._replace(op_name=op_name)
            yield name, one, times
            for inner, more in self._inner(name, one, fused):
                yield from self._visit(inner, times * more, fused, one.op_name)

    def _inner(self, name: str, one: Instruction, fused: bool) -> list[tuple[str, float]]:
        """Returns the computations that an instruction runs, and how often."""
        if one.opcode == "while":
            trips = self.trips(name, one)
            return [(one.called["body"][0], 1 if trips is None else trips)]
        if one.opcode == "conditional":
            branches = [branch for found in one.called.values() for branch in found]
            return [(max(branches, key=self._cycles_of), 1)] if branches else []
        if one.opcode in ("call", "async-start") or (fused and one.opcode == "fusion"):
            return [(called, 1) for found in one.called.values() for called in found]
        return []

    def _cycles_of(self, name: str) -> float:
        if name not in self._cycles:
            total = 0.0
            for one in self.computations[name].values():
                inner = self._inner(name, one, fused=False)
                total += one.cycles or 0
                total += sum(times * self._cycles_of(called) for called, times in inner)
            self._cycles[name] = total
        return self._cycles[name]


def _value(constant: Instruction) -> str:
    return constant.text.partition(")")[0]


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


def _instruction(line: str) -> Instruction:
    """Returns the instruction of one (joined) line."""
    root, name, rest = _INSTRUCTION.match(line).groups()  # type: ignore[union-attr]
    typed = _TYPED.match(rest)
    assert typed is not None, line[:200]
    text = rest[typed.end() :]
    operands, _, attributes = text.partition("), ") if "), " in text else (text, "", "")
    arrays = tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), not _FAST.search(layout or ""))
        for dtype, dims, layout in _ARRAY.findall(typed[1])
    )
    cycles, op_name, channel = (p.search(attributes) for p in (_CYCLES, _OP_NAME, _CHANNEL))
    return Instruction(
        name,
        typed[2],
        arrays,
        tuple(_NAMED.findall(operands)),
        {key: tuple(_NAMED.findall(names)) for key, names in _CALLED.findall(attributes)},
        int(cycles[1]) if cycles else None,
        op_name[1] if op_name else "",
        int(channel[1]) if channel else None,
        root is not None,
        text,
    )
