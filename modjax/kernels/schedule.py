"""Lower bounds on the cycles of Pallas kernels, from their final schedules.

The compiler estimates no cycles for them, but it can write the schedule of each: one line a bundle
of instructions, which takes at least one cycle. A bound is the number of bundles of each region
times how often the region runs, and never less than the matrix units need for the region's
products. Waiting for memory is in no bound.

A kernel loops over a grid of blocks. In the loop, a region with matrix products runs for the blocks
that the mask leaves. Other regions, which begin or end a row of blocks, run once a row.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modjax.kernels.chips import described_devices

# HLO's names of dtypes that are not NumPy's.
DTYPES = {"pred": "bool", "bf16": "bfloat16"} | {
    f"{short}{bits}": f"{long}{bits}"
    for short, long in (("s", "int"), ("u", "uint"), ("f", "float"))
    for bits in (8, 16, 32, 64)
}
# Rows that a matrix unit takes in a cycle.
ROWS_PER_CYCLE = {"v5e": 1, "v5p": 1, "v6e": 2}
DELAY = 5  # a branch takes effect after the four bundles that follow it
STAGES = 2  # trips of a pipelined loop beyond its grid: the first loads, the last stores

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:(.*)")
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel( \([^)]*\))? target = \$region(\d+)")
_TRIPS = re.compile(r"totalorder [^,]*, (\d+) /\* loop exit test")
_PRODUCT = re.compile(r"vmatmul[.\w]*?\.(bf16|f32|s8|\w+)\.[.\w]*mxu(\d)")


Placed = tuple[str, tuple[int, ...], bool]


class Kernel(NamedTuple):
    """A kernel as a compiled program calls it.

    operands, results: dtype in HLO's words, dims, and whether in main memory, of each array.
    config: the kernel itself, as JSON, in the form that the compiler reads.
    """

    operands: tuple[Placed, ...]
    results: tuple[Placed, ...]
    config: str


class Blocks(NamedTuple):
    """The part of its grid that the mask of an attention kernel leaves.

    share: of the blocks.
    width: blocks of a row of the grid.
    """

    share: float
    width: int


class Region(NamedTuple):
    """Bundles from `start` to before `end`. trips: of a loop; None for one that may be skipped."""

    start: int
    end: int
    trips: int | None


def blocks_of(kernel: str, kinds: Sequence[int], dims: tuple[int, ...]) -> Blocks | None:
    """Returns the blocks of splash attention by the kinds in its mask; None for another kernel.

    kinds: of dims (heads, query blocks, key blocks); 0 is hidden whole.
    """
    if not kernel.startswith("splash") or len(dims) != 3:
        return None
    width = dims[1] if "dkv" in kernel else dims[2]
    return Blocks(sum(kind != 0 for kind in kinds) / len(kinds), width)


def schedules(kernels: Sequence[Kernel], topology: str) -> list[str]:
    """Returns the final schedules of kernels for a topology. It takes about a second each.

    Another process compiles them: the compiler's library reads its settings when it is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "xla_jf_dump_to": folder,
            "xla_jf_dump_llo_text": "true",
            "xla_jf_dump_llo_pass_label_regex": "final_bundles",
        }
        added = " ".join(f"--{name}={value}" for name, value in flags.items())
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "LIBTPU_INIT_ARGS": f"{given} {added}".strip(),
        }
        subprocess.run(
            [sys.executable, "-P", "-m", __name__, topology, folder],
            input=json.dumps(kernels),
            env=os.environ | settings,
            text=True,
            capture_output=True,
            check=True,
        )
        paths = [Path(folder) / f"{index}.txt" for index in range(len(kernels))]
        return [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]


def _dump(topology: str, folder: Path) -> None:
    """Compiles the kernels of standard input, and writes the schedule of number i to i.txt."""
    import jax

    one = jax.sharding.SingleDeviceSharding(described_devices(topology)[0])
    for index, (operands, results, config) in enumerate(json.load(sys.stdin)):
        given = [_array(array, one) for array in operands]
        places = {
            "input_memory_space_colors": [
                {"operand_index": i, "color": int(not main)}
                for i, (*_, main) in enumerate(operands)
            ],
            "output_memory_space_colors": [
                {"shape_index": [i] * (len(results) > 1), "color": int(not main)}
                for i, (*_, main) in enumerate(results)
            ],
        }
        made = [_array(array) for array in results]
        for added in (places, {}):  # a program of its own may have no room in the fast memory
            text = json.dumps({"custom_call_config": json.loads(config) | added})
            call = jax.ffi.ffi_call(
                "tpu_custom_call", made, custom_call_api_version=1, legacy_backend_config=text
            )
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.jit(call).lower(*given).compile()
                break
        for path in folder.glob("*-*-final_bundles.txt"):
            if re.search(r"-ffi_call[.\d]*-\d+-final_bundles", path.name):
                path.replace(folder / f"{index}.txt")
            else:
                path.unlink()


def _array(array: Placed, sharding: Any = None) -> Any:
    import jax

    dtype, dims, _ = array
    return jax.ShapeDtypeStruct(tuple(dims), DTYPES.get(dtype, dtype), sharding=sharding)


def bound(schedule: str, chip: str, blocks: Blocks | None = None) -> float | None:
    """Returns a lower bound on the cycles of a kernel, or None if its loops cannot be counted.

    blocks: None for a kernel without a mask.
    """
    bundles, labels, found = {}, {}, []
    trips = None
    for line in schedule.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        at, text = int(match[1], 0), match[2]
        bundles[at] = text
        labels |= {name: at for name in _LABEL.findall(text)}
        if test := _TRIPS.search(text):
            trips = int(test[1])
        found += [(at, when, name, trips) for when, name in _BRANCH.findall(text)]
    regions = []
    for at, when, name, exit_test in found:
        target = labels.get(name)
        if target is None or (target <= at and exit_test is None):
            return None
        if target <= at:
            regions.append(Region(target, at + DELAY, exit_test))
        elif when:
            regions.append(Region(at + DELAY, target, None))
        else:  # the other branch: it need not run
            regions.append(Region(at + DELAY, target, 0))
    regions.sort(key=lambda region: (region.start, -region.end))
    whole = Region(0, max(bundles, default=-1) + 1, 1)
    rows = ROWS_PER_CYCLE[chip]
    return _cycles(whole, regions, bundles, rows, blocks, depth=0)


def _cycles(
    region: Region,
    regions: Sequence[Region],
    bundles: dict[int, str],
    rows: int,
    blocks: Blocks | None,
    depth: int,
) -> float | None:
    """Returns the cycles of one pass through a region. depth: skippable regions around it."""
    inner = [r for r in regions if r != region and region.start <= r.start and r.end <= region.end]
    children, end = [], -1
    for candidate in inner:
        if candidate.start >= end:
            children.append(candidate)
            end = candidate.end
    own = [
        text
        for at, text in bundles.items()
        if region.start <= at < region.end and not any(c.start <= at < c.end for c in children)
    ]
    total = float(max(len(own), _product_cycles(own, rows)))
    for child in children:
        skippable = child.trips is None
        each = _cycles(child, inner, bundles, rows, blocks, depth + skippable)
        if each is None:
            return None
        text = (bundles[at] for at in range(child.start, child.end) if at in bundles)
        often = _often(child, region, any(map(_PRODUCT.search, text)), blocks, depth)
        if often is None:
            return None
        total += often * each
    return total


def _often(
    child: Region, parent: Region, multiplies: bool, blocks: Blocks | None, depth: int
) -> float | None:
    """Returns how often a region runs in one pass through its parent; None if not known.

    multiplies: whether it has matrix products.
    """
    if child.trips is not None:
        return child.trips
    if depth == 0:  # one stage of the pipeline, or what the first or last trip does
        loops = parent.trips or 1
        return (loops - STAGES) / loops if multiplies and loops > STAGES else 0.0
    if depth > 1:
        return 1.0 if multiplies else 0.0
    if not multiplies:
        return 1 / blocks.width if blocks else 0.0
    return blocks.share if blocks else None


def _product_cycles(texts: Sequence[str], rows_per_cycle: int) -> float:
    """Returns the cycles that the busiest matrix unit needs for the products of some bundles."""
    busy: dict[str, float] = {}
    for text in texts:
        for dtype, unit in _PRODUCT.findall(text):
            rows = {"f32": 8, "s8": 32}.get(dtype, 16)  # of a register
            busy[unit] = busy.get(unit, 0.0) + rows / rows_per_cycle
    return max(busy.values(), default=0.0)


if __name__ == "__main__":
    _dump(sys.argv[1], Path(sys.argv[2]))
