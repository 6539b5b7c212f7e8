"""The table of chips, and devices that are described."""

import importlib.util

import pytest

from modjax.errors import InputError
from modjax.kernels.chips import CHIPS, chip_of, described_devices


def test_peak_flops_are_those_of_the_matrix_units_at_the_clock():
    clocks = {chip.name: chip.clock for chip in CHIPS.values() if chip.flops_per_cycle}
    # GHz, as the compiler assumes them.
    assert clocks == pytest.approx({"v5e": 1.503e9, "v5p": 1.75e9, "v6e": 1.75e9}, rel=1e-3)


@pytest.mark.parametrize(
    "topology, slices, chips, name",
    [("v5e:4x4", 1, 16, "v5e"), ("v5p:2x2x2", 1, 8, "v5p"), ("v6e:1x1", 1, 1, "v6e")],
)
def test_a_topology_has_the_chips_that_its_sides_say(topology, slices, chips, name):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    found = described_devices(topology, slices)
    assert len(found) == chips and {chip_of(device).name for device in found} == {name}


def test_slices_are_numbered():
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    found = described_devices("v5e:2x2", 3)
    assert [device.slice_index for device in found] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "topology, slices",
    [
        ("v5e", 1),
        ("v5e:4", 1),
        ("v5e:4x4x4", 1),
        ("v5p:4x4", 1),
        ("v9:4x4", 1),
        ("v5e:3x3", 1),
        ("v5e:0x0", 1),
        ("v5e:9998x9998", 1),
        ("", 1),
        ("v5e:2x2", 0),
        ("v5e:2x2", -1),
    ],
)
def test_an_unknown_topology_is_one_line_with_the_accepted_forms(topology, slices):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    with pytest.raises(InputError, match=r"such as v5e:4x4|must be 1 to"):
        described_devices(topology, slices)


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu.*pip install 'modjax\[aot\]'"):
        described_devices("v5e:4x4")
