"""Meshes over several TPU slices, and over parts of one, without a TPU."""

import math
import re

import numpy as np
import pytest

from modjax.errors import InputError
from modjax.flops import parameters
from modjax.kernels.chips import described_devices
from modjax.specs import Dense, Execution, MoD, ModelSpec, TrainConfig
from modjax.training.fitting import fitted
from modjax.training.mesh import make_mesh
from modjax.training.programs import lower_train_step
from modjax.training.state import abstract_model

pytest.importorskip("libtpu", reason="describes TPUs: pip install 'jax[tpu]'")

SMALL = ModelSpec(1024, 512, 2, 4, 4, 2048, (Dense(), MoD()), dtype="bfloat16")


def slices_of(mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"expert": 4}])
def test_data_lies_across_slices_and_all_else_inside_one(sizes):
    mesh = make_mesh(Execution(**sizes), described_devices("v5e:2x2", 2))
    assert mesh.size == 8
    found = slices_of(mesh)
    assert (found == found[:, :1, :1, :1]).all(), "each place on data is in one slice"
    assert found[:, 0, 0, 0].tolist() == sorted(found[:, 0, 0, 0]), "neighbours share a slice"
    assert np.bincount(found.ravel()).tolist() == [4, 4]


def test_a_mesh_that_needs_one_slice_lies_in_one():
    mesh = make_mesh(Execution(data=2, fsdp=2), described_devices("v5e:2x2", 2))
    assert mesh.size == 4 and (slices_of(mesh) == 0).all()


def test_a_mesh_may_split_the_sides_of_any_torus():
    for topology in ("v5e:4x4", "v6e:4x4", "v5p:4x4x2"):
        devices = described_devices(topology)
        mesh = make_mesh(Execution(fsdp=2, tensor=2), devices)
        assert set(mesh.devices.flat) == set(devices), topology


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 3, "tensor": 2}, {"data": 1, "fsdp": 8}])
def test_other_axes_across_slices_are_refused(sizes):
    with pytest.raises(InputError) as caught:
        make_mesh(Execution(**sizes), described_devices("v5e:2x2", 2))
    said, data = str(caught.value), sizes.get("data", 1)
    assert said.startswith(f"execution.data = {data}: must be a multiple of the 2 slices")
    assert "\n" not in said


def test_parameters_that_need_more_than_a_slice_do_not_fit():
    model, train = abstract_model(SMALL), TrainConfig(16, 512, 1000, 1e-3, 20)
    with pytest.raises(InputError, match=r"train.batch_size = 16: does not fit"):
        fitted(model, train, Execution(), described_devices("v5e:2x2", 2), memory=20_000_000)


def test_devices_that_form_no_block_are_refused():
    with pytest.raises(InputError, match=r"execution.data = 3: .*devices"):
        make_mesh(Execution(data=3), described_devices("v5e:2x2"))


@pytest.mark.slow
def test_only_the_reduction_of_gradients_crosses_slices():
    execution = Execution(fsdp=2, layer_loop="unroll", remat="full")
    mesh = make_mesh(execution, described_devices("v5e:2x2", 2))
    train = TrainConfig(16, 512, 1000, 1e-3, 20)
    step = lower_train_step(mesh, abstract_model(SMALL), train, execution).compile()
    # The program is that of one slice, which hands over what it has reduced inside.
    sent = re.findall(
        r'= \(\w+\[([\d,]*)\]\S*, u32\[\], token\[\]\) send\(.*_transfer_type="(\w+)"',
        step.as_text(),
    )
    assert {kind for _, kind in sent} == {"ALL_REDUCE"}
    numbers = sum(math.prod(int(size) for size in shape.split(",") if size) for shape, _ in sent)
    gradients = parameters(SMALL)["total"] / 4  # each device of the slice hands over its part
    assert gradients <= numbers < 1.01 * gradients
