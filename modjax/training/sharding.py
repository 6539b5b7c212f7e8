"""The mesh, and what lies where on it; modjax/nn/sharding.py has the table of axes.

Legend: B batch, L positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from modjax.backend import starting
from modjax.errors import require
from modjax.nn.sharding import LOGICAL_TO_MESH, MESH_AXES, partition_spec, ways
from modjax.spec import Execution, TrainConfig


def make_mesh(execution: Execution, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of MESH_AXES; `execution.data` = 0 takes the devices that remain.

    Raises InputError where the sizes do not fit the number of devices.
    """
    if devices is None:
        with starting():
            devices = jax.devices()
    inner = execution.fsdp * execution.tensor * execution.expert
    require(
        len(devices) % inner == 0,
        "execution.fsdp * tensor * expert",
        inner,
        f"must divide the number of devices, {len(devices)}",
    )
    data = execution.data or len(devices) // inner
    require(
        data * inner <= len(devices),
        "execution.data",
        data,
        f"needs {data * inner} devices with fsdp * tensor * expert = {inner}; there are "
        f"{len(devices)}",
    )
    sizes = (data, execution.fsdp, execution.tensor, execution.expert)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices[: data * inner])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every (B, L) array of a batch."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays (B, L), the same on every process, as global arrays sharded over the batch."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x_BL: jax.make_array_from_callback(x_BL.shape, sharding, lambda i: x_BL[i]), batch
    )


def param_shardings(mesh: Mesh, params: Any, logical_axes: Any) -> Any:
    """The sharding of every parameter. Raises InputError where a dim can't be split evenly."""

    def one(path, param, axes):
        for size, logical, axis in zip(param.shape, axes, partition_spec(axes), strict=True):
            parts = ways(mesh, axis)
            require(
                size % parts == 0,
                f"execution.{axis}",
                parts,
                f"must divide {size}, the {logical} dimension of {jax.tree_util.keystr(path)}",
            )
        return NamedSharding(mesh, partition_spec(axes))

    return jax.tree_util.tree_map_with_path(one, params, logical_axes)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raises InputError unless each forward pass splits evenly over the mesh."""
    parts = ways(mesh, LOGICAL_TO_MESH["batch"])
    require(
        train.batch_size % (parts * train.accumulation) == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of {parts * train.accumulation}, the mesh's data * fsdp * expert = "
        f"{parts} times train.accumulation = {train.accumulation}",
    )
