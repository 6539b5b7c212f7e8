"""The device mesh and the sharding of batches; modjax/sharding.py has the table of axes.

Legend: B batch, L positions.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding

from modjax.backend import starting
from modjax.errors import InputError, require
from modjax.kernels import slice_of
from modjax.sharding import LOGICAL_TO_MESH, MESH_AXES, num_shards, partition_spec
from modjax.specs import Execution, TrainConfig


def make_mesh(execution: Execution, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes MESH_AXES, of which only `data` lies across slices.

    devices: devices to use; None uses all. `execution.data` = 0 takes those that are left, and
      `execution.fsdp` = 0 takes 1, see fitting.py.
    Raises InputError if the sizes of the axes do not fit the devices and their slices.
    """
    if devices is None:
        with starting():
            devices = jax.devices()
    execution = execution.settled()
    inner = execution.fsdp * execution.tensor * execution.expert
    count, sizes = len(devices), "fsdp * tensor * expert"
    need = f"must divide the number of devices, {count}"
    require(count % inner == 0, f"execution.{sizes}", inner, need)
    data = execution.data or count // inner
    need = f"needs {data * inner} devices with {sizes} = {inner}; there are {count}"
    require(data * inner <= count, "execution.data", data, need)
    shape = (data, execution.fsdp, execution.tensor, execution.expert)
    arranged = _arranged(shape, devices[: data * inner])
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in a mesh of this shape, whose first axis lies across slices."""
    sizes = collections.Counter(map(slice_of, devices))
    slices, size, data = len(sizes), min(sizes.values()), shape[0]
    need = f"must be a multiple of the {slices} slices: other axes lie in one, of {size} devices"
    fits = size * slices == len(devices) and data % slices == 0
    require(fits, "execution.data", data, need)
    # jax.make_mesh takes neither slices nor, on most chips, a mesh that splits a side of the torus.
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if slices == 1:
            return create_device_mesh(shape, **options)
        inside, across = (data // slices, *shape[1:]), (slices, *[1] * len(shape[1:]))
        return create_hybrid_device_mesh(inside, across, **options)
    except AssertionError as error:  # some devices of a torus
        need = f"takes {len(devices)} devices, which form no block of the topology"
        raise InputError("execution.data", data, need) from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the (B, L) arrays of a batch."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a batch that the devices of this process need, sorted."""
    sharding, rows = NamedSharding(mesh, partition_spec(("batch",))), np.arange(batch_size)
    parts = sharding.addressable_devices_indices_map(rows.shape).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def put_batch(batch: Any, mesh: Mesh, batch_size: int | None = None) -> Any:
    """Returns a batch on the mesh.

    batch: host arrays, (B, L), of this process's `local_rows`.
    batch_size: rows of the whole batch; None if `batch` has all of them.
    """

    def put(x_BL: np.ndarray) -> jax.Array:
        shape = (batch_size or len(x_BL), *x_BL.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh), x_BL, shape)

    return jax.tree.map(put, batch)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raises InputError unless the batch of each forward pass splits evenly over the mesh."""
    parts = num_shards(mesh, LOGICAL_TO_MESH["batch"])
    unit = parts * train.accumulation
    need = (
        f"must be a multiple of {unit}, the mesh's data * fsdp * expert = {parts} times "
        f"train.accumulation = {train.accumulation}"
    )
    require(train.batch_size % unit == 0, "train.batch_size", train.batch_size, need)
