"""The device mesh and the sharding of batches; modjax/sharding.py has the table of axes.

Legend: B batch, L positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from modjax.backend import starting
from modjax.errors import require
from modjax.sharding import LOGICAL_TO_MESH, MESH_AXES, num_shards, partition_spec
from modjax.specs import Execution, TrainConfig


def make_mesh(execution: Execution, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes MESH_AXES.

    devices: devices to use; None uses all. `execution.data` = 0 takes those that are left.
    Raises InputError if the sizes of the axes do not fit the number of devices.
    """
    if devices is None:
        with starting():
            devices = jax.devices()
    inner = execution.fsdp * execution.tensor * execution.expert
    count, sizes = len(devices), "fsdp * tensor * expert"
    need = f"must divide the number of devices, {count}"
    require(count % inner == 0, f"execution.{sizes}", inner, need)
    data = execution.data or count // inner
    need = f"needs {data * inner} devices with {sizes} = {inner}; there are {count}"
    require(data * inner <= count, "execution.data", data, need)
    shape = (data, execution.fsdp, execution.tensor, execution.expert)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[: data * inner])


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
