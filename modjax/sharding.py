"""Logical axes of tensors, their mesh axes, and the sharding of activations.

modjax's mesh, set by `jax.set_mesh`, has the axes `data`, `fsdp`, `tensor` and `expert` with Auto
types. Without it, or under another mesh, nothing is constrained; even there top-k stays within a
shard.

Legend: B batch, L positions.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from modjax.errors import require

LOGICAL_TO_MESH: dict[str | None, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": None,  # routing is per sequence: a split sequence would make it communicate
    # parameters
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "replicated": None,
    None: None,
}
MESH_AXES = ("data", "fsdp", "tensor", "expert")


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of a tensor whose dims have these logical axes."""
    return PartitionSpec(*(LOGICAL_TO_MESH[name] for name in logical_axes))


def weight_sharding(
    mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None], name: str
) -> NamedSharding:
    """Returns the sharding of a weight with these logical axes.

    Raises InputError, which names the weight, if a dim does not split evenly over the mesh.
    """
    spec = partition_spec(axes)
    for size, logical, axis in zip(shape, axes, spec, strict=True):
        parts = num_shards(mesh, axis)
        need = f"must divide {size}, the {logical} dimension of {name}"
        require(size % parts == 0, f"execution.{axis}", parts, need)
    return NamedSharding(mesh, spec)


def num_shards(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts into which the mesh splits a dim on these axes."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Fixes the sharding of an activation. Raises ValueError unless every dim of `x` is named."""
    if len(logical_axes) != x.ndim:
        raise ValueError(f"{logical_axes} names {len(logical_axes)} dims of shape {x.shape}")
    if not _is_ours(jax.sharding.get_abstract_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def gathered(w: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Returns a weight with these logical axes, whole along the mesh axis "fsdp"."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_ours(mesh) or mesh.shape["fsdp"] == 1:
        return w
    return constrain(w, *(None if LOGICAL_TO_MESH[n] == "fsdp" else n for n in logical_axes))


def per_sequence(function: Callable[[jax.Array], jax.Array], x_BL: jax.Array) -> jax.Array:
    """Returns function(x_BL), computed by every device on its own rows.

    function: each row of its result, of any rank, depends on that row of x_BL only.
    The partitioner would gather the batch for some operations, such as top-k. It still does if the
    rows do not split evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_ours(mesh):
        return _row_by_row(function, x_BL) if jax.device_count() > 1 else function(x_BL)
    if mesh.size == 1 or x_BL.shape[0] % num_shards(mesh, LOGICAL_TO_MESH["batch"]) != 0:
        return function(x_BL)
    spec = partition_spec(("batch",))
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)(x_BL)


def per_device(function: Callable[..., jax.Array], weights: Any, *arrays: jax.Array) -> jax.Array:
    """Returns function(weights, *arrays), computed by every device on its own rows.

    weights: a tree that every device needs whole. It is gathered once before `function`, and its
    gradient is summed over devices once after it, even if `function` loops. The partitioner still
    handles the axis "tensor".
    """
    if batch_shards(arrays[0].shape[0]) == 1:
        return function(weights, *arrays)
    rows = partition_spec(("batch",))
    return jax.shard_map(
        function,
        in_specs=(PartitionSpec(), *[rows] * len(arrays)),
        out_specs=rows,
        axis_names=set(LOGICAL_TO_MESH["batch"] or ()),
        check_vma=False,
    )(weights, *arrays)


def takes_kernels() -> bool:
    """Returns whether a kernel can be called here that the partitioner cannot split.

    Under another mesh, or with shardings but no mesh, the partitioner would refuse it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or _is_ours(mesh) or AxisType.Manual in mesh.axis_types


def on_each_shard(
    function: Callable[..., jax.Array],
    axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[str | None],
    *arrays: jax.Array,
) -> jax.Array:
    """Returns function(*arrays), computed by every device on its own part of each array.

    The partitioner cannot split a kernel, and would gather its inputs.

    function: its result splits as its arguments do; no part needs another.
    axes: the logical axes of each array. A dim that does not split evenly is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_ours(mesh) or mesh.size == 1:
        return function(*arrays)
    sizes: dict[str | None, list[int]] = {}
    for names, x in zip(axes, arrays, strict=True):
        for name, size in zip(names, x.shape, strict=True):
            sizes.setdefault(name, []).append(size)

    def spec(names: Sequence[str | None]) -> PartitionSpec:
        # Heads and kv heads lie on one mesh axis: they split together, or not at all.
        even = {
            axis: all(
                size % num_shards(mesh, axis) == 0
                for name, all_sizes in sizes.items()
                if LOGICAL_TO_MESH[name] == axis
                for size in all_sizes
            )
            for axis in partition_spec(names)
        }
        return PartitionSpec(*(axis if even[axis] else None for axis in partition_spec(names)))

    in_specs = tuple(map(spec, axes))
    run = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False
    )
    return run(*arrays)


def _row_by_row(function: Callable[[jax.Array], jax.Array], x_BL: jax.Array) -> jax.Array:
    """Returns function(x_BL), computed by every device on its own rows of an unknown mesh."""
    ranks = x_BL.ndim, jax.eval_shape(function, x_BL).ndim
    others = [
        [f"{side}{dim}" for dim in range(rank - 1)] for side, rank in zip("io", ranks, strict=True)
    ]
    given, made = (" ".join(["rows", *names]) for names in others)
    split = custom_partitioning(lambda x_BL: function(x_BL))  # it takes no keywords
    split.def_partition(
        lambda mesh, args, out: (mesh, function, out.sharding, (args[0].sharding,)),
        sharding_rule=f"{given} -> {made}",
        need_replication_factors=tuple(itertools.chain(*others)),
    )

    @jax.custom_batching.custom_vmap
    def call(x_BL):
        return split(x_BL)

    @call.def_vmap
    def many(size, batched, x):
        out = call(x.reshape(-1, *x.shape[2:]))
        return out.reshape(size, -1, *out.shape[1:]), True

    return call(x_BL)


def batch_shards(batch: int) -> int:
    """Returns the number of equal parts into which the mesh splits a batch; 1 if it cannot."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = num_shards(mesh, LOGICAL_TO_MESH["batch"]) if _is_ours(mesh) else 1
    return parts if batch % parts == 0 else 1


def _is_ours(mesh: AbstractMesh) -> bool:
    """Returns whether this is modjax's mesh, and not the inside of a shard_map."""
    manual = AxisType.Manual in mesh.axis_types
    return not mesh.empty and mesh.axis_names == MESH_AXES and not manual
