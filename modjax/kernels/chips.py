"""Accelerator chips, and descriptions of devices that are not there, to compile for."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from modjax.errors import InputError, require

GIB = 2**30
ACCEPTED = (
    "must be such as v5e:4x4, v6e:16x16 or v5p:2x2x1: a chip, and the sides of its torus, of which "
    "the first two are even, or all are 1"
)
MOST_CHIPS = 10_000  # of a topology, more than any has


class Chip(NamedTuple):
    """Published figures of a chip, of which a program uses one device.

    memory: bytes that a program can use.
    flops: peak FLOP/s of products in bfloat16.
    bandwidth: bytes/s to and from that memory.
    links: bytes/s to and from all other chips together.
    flops_per_cycle: of products in bfloat16; None if no compiler estimates cycles.
    torus: number of sides of a topology; 0 if none can be described.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    flops_per_cycle: int | None = None
    torus: int = 0

    @property
    def clock(self) -> float:
        """Cycles per second. Compilers estimate cycles at this clock."""
        assert self.flops_per_cycle is not None
        return self.flops / self.flops_per_cycle


# FLOP/s, bandwidth and links: docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. Memory: the limit
# that libtpu 0.0.42.1 names when a program needs more. FLOP per cycle: four units of 128 x 128
# multiply-adds in v5e, eight in v5p, two of 256 x 256 times two in v6e; the compiler's estimates of
# products of 16384 x 4096 x 4096 reach 98%, 98% and 91% of them.
# NVIDIA's: the data sheets of H100 SXM and H200 SXM, dense; memory as nvidia-smi reports it.
CHIPS = {
    "TPU v5 lite": Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 400e9, 131_072, 2),
    "TPU v5": Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 1200e9, 262_144, 3),
    "TPU v6 lite": Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 800e9, 524_288, 2),
    "NVIDIA H100 80GB HBM3": Chip("H100", 81_559 * 2**20, 989e12, 3350e9, 900e9),
    "NVIDIA H200": Chip("H200", 143_771 * 2**20, 989e12, 4800e9, 900e9),
}
# Without them, the compiler's library asks the machine what it is, complains, and lets one process
# of a machine load it.
_SETTINGS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def chip_of(device: Any) -> Chip:
    """Returns the chip of a device. Raises InputError for one that is not in the table."""
    known = ", ".join(chip.name for chip in CHIPS.values())
    require(device.device_kind in CHIPS, "device", device.device_kind, f"unknown; known: {known}")
    return CHIPS[device.device_kind]


def described_devices(topology: str, slices: int = 1) -> list[Any]:
    """Returns the devices of a topology such as "v5e:4x4", which need not be there.

    Programs can be compiled for them, and not run.

    slices: number of such topologies, joined by the data centre's network.
    Raises InputError for a topology that the compiler does not know, and without the compiler.
    """
    remedy = "is not installed: it holds the compiler, pip install 'modjax[aot]'"
    require(importlib.util.find_spec("libtpu") is not None, "libtpu", None, remedy)
    require(0 < slices <= MOST_CHIPS, "--slices", slices, f"must be 1 to {MOST_CHIPS}")
    name, *sides = re.split("[:x]", topology)
    torus = {chip.name: chip.torus for chip in CHIPS.values() if chip.torus}
    formed = torus.get(name) == len(sides) and all(side.isdecimal() for side in sides)
    formed = formed and 0 < math.prod(map(int, sides)) <= MOST_CHIPS
    require(formed, "--topology", topology, f"{ACCEPTED}; chips: {', '.join(torus)}")
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if set(sides) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # else a host has four chips
    with _settings():
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(topology, platform="tpu", **options)
        except Exception as error:
            raise InputError("--topology", topology, f"{ACCEPTED}: {error}") from error
    return list(found.devices)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Sets the environment of the compiler's library while it is loaded."""
    added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
