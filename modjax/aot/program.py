"""The trips of the loops of a compiled program, and the sum of its estimated cycles.

The compiler prints an estimate of cycles beside most instructions. It prints no trip counts, so
they are derived from the condition, the step and the start of each loop.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from modjax.aot.hlo import Computation, Instruction, parse

# Instructions that pass on an array, and that pass on its value.
VIEWS = ("bitcast", "opt-barrier")
COPIES = (*VIEWS, "copy", "copy-start", "copy-done", "convert")
INTEGERS = ("s32[]", "u32[]")


class Program:
    """A compiled program, parsed from its text.

    computations: name -> instructions.
    entry: name of the computation that runs first.
    unknown: loops whose trips the text does not tell; they count as one trip.
    """

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
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
        found = self.source(computation, name)
        return found if found is not None and found.opcode == "constant" else None

    def source(
        self, computation: str, name: str, aliases: Sequence[str] = COPIES
    ) -> Instruction | None:
        """Returns the instruction that makes a value, or None if a loop changes it.

        Looks through `aliases`, tuples, and loops that pass the value on.
        """
        found = self._origin(computation, name, aliases)
        if found is None or found.opcode != "get-tuple-element":
            return found
        place, holder = _index(found), self._origin(computation, found.operands[0], aliases)
        if holder is None:
            return None
        if holder.opcode == "tuple":
            return self.source(computation, holder.operands[place], aliases)
        if holder.opcode == "parameter" and computation in self._callers:
            computation, holder = self._callers[computation]
        if holder.opcode == "while":
            return self._through(computation, holder, place, aliases)
        return None

    def _through(
        self, computation: str, loop: Instruction, place: int, aliases: Sequence[str]
    ) -> Instruction | None:
        """Returns the `source` of a place of a loop's tuple, if it is the same in every trip.

        A trip may fill the place with a copy of another one.
        """
        found = self.enters(computation, loop, place, aliases)
        body, places = loop.called["body"][0], {place}
        root = _root(self.computations[body])
        while root.opcode == "tuple":
            next_one = self._origin(body, root.operands[place], aliases)
            if next_one is None or next_one.opcode != "get-tuple-element":
                return None
            holder = self._origin(body, next_one.operands[0], aliases)
            if holder is None or holder.opcode != "parameter":
                return None
            place = _index(next_one)
            if place in places:
                return found
            places.add(place)
            if self.enters(computation, loop, place, aliases) is not found:
                return None
        return None

    def enters(
        self, computation: str, loop: Instruction, place: int, aliases: Sequence[str] = COPIES
    ) -> Instruction | None:
        """Returns the `source` of the value with which a loop begins at a place of its tuple."""
        entering = self._origin(computation, loop.operands[0], aliases)
        if entering is None or entering.opcode != "tuple" or place >= len(entering.operands):
            return None  # a tuple may contain others
        return self.source(computation, entering.operands[place], aliases)

    def _origin(
        self, computation: str, name: str, aliases: Sequence[str] = COPIES
    ) -> Instruction | None:
        found = self.computations[computation].get(name)
        while found is not None and found.opcode in aliases:
            found = self.computations[computation].get(found.operands[0])
        return found

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
        integers = [
            int(_value(one))
            for one in self.within(condition)
            if one.opcode == "constant" and str(one.arrays[0]) in INTEGERS
        ]
        if not integers or not compared:
            return None
        read = [
            _index(one)
            for one in condition.values()
            if one.opcode == "get-tuple-element" and str(one.arrays[0]) in INTEGERS
        ]
        if len(read) != 1:
            return max(integers)
        start = self.enters(computation, loop, read[0])
        first = int(_value(start)) if start and start.opcode == "constant" else 0
        return max(0, -((first - max(integers)) // self._step(loop.called["body"][0], read[0])))

    def within(self, computation: Computation) -> Iterator[Instruction]:
        """Yields the instructions of a computation, with those of its fusions."""
        for one in computation.values():
            yield one
            for name in one.called.get("calls", ()):
                yield from self.within(self.computations[name])

    def _step(self, body: str, place: int) -> int:
        """Returns by how much a loop's counter grows in one trip; 1 if the text does not tell."""
        root = _root(self.computations[body])
        new = self._origin(body, root.operands[place]) if root.opcode == "tuple" else None
        if new is None or new.opcode != "add":
            return 1
        added = (self.constant(body, operand) for operand in new.operands)
        return max([1, *(int(_value(one)) for one in added if one is not None)])

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


def _index(element: Instruction) -> int:
    """Returns the place of a get-tuple-element."""
    return int(element.text.partition("index=")[2].partition(",")[0])


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.root)
