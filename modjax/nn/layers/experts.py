"""Computation of a mixture's experts: in slots, in groups, or one expert after another.

On a mesh every device works on its own rows, and the experts are split over the `expert` axis.
Each expert has a fixed number of slots, so slots travel to their expert's device and back. Groups
vary in size, so instead every device gathers the weights of all experts.

Legend: B batch, L positions, P picks of a position, E experts, C slots of an expert, T rows,
Y picks of all rows, Z rows of a block, D model width, F feed-forward width, R scores of a position.
A block has all slots of one expert, over all sequences.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from modjax.kernels import (
    first_with_counts,
    grouped_matmul,
    project,
    project_back,
    weighted_product,
)
from modjax.nn.layers.dense import mlp
from modjax.nn.routing.selection import ROUTING
from modjax.sharding import LOGICAL_TO_MESH, batch_shards, num_shards, partition_spec

Matrices = Mapping[str, jax.Array]  # of an MLP, stacked over experts: (E, D, F)
MATRIX_AXES = ("experts", "embed", "mlp")


class Picks(NamedTuple):
    """The picks of each position.

    experts_BLP: the experts; E marks no expert.
    weights_BLP: their weights.
    rows_BR: how often each output of the router, an expert or a no-op, was picked.
    tied_BE: whether each expert's best positions end in a near tie; None if experts do not choose.
    """

    experts_BLP: jax.Array
    weights_BLP: jax.Array
    rows_BR: jax.Array
    tied_BE: jax.Array | None = None


class Slots(NamedTuple):
    """The positions that each expert takes.

    tokens_BEC: the positions; L marks an empty slot.
    weights_BEC: their weights.
    taken_BL: how many experts take each position.
    """

    tokens_BEC: jax.Array
    weights_BEC: jax.Array
    taken_BL: jax.Array


@jax.named_scope("router")
def slots_of(picks: Picks, experts: int, size: int, size_B: jax.Array) -> Slots:
    """Returns slots with each expert's first size_B <= size positions. Later ones are dropped."""
    mine_BLPE = jax.nn.one_hot(picks.experts_BLP, experts, dtype=bool)
    weights_BLE = jnp.sum(jnp.where(mine_BLPE, picks.weights_BLP[..., None], 0.0), axis=2)
    mine_BEL = jnp.any(mine_BLPE, axis=2).swapaxes(1, 2)
    count_BEL = jnp.cumsum(mine_BEL, axis=2, dtype=jnp.int32)
    filled_B1C = jnp.arange(size)[None, None] < size_B[:, None, None]
    tokens_BEC = jnp.where(filled_B1C, first_with_counts(count_BEL, size), mine_BEL.shape[2])
    tokens_BEC = checkpoint_name(tokens_BEC, ROUTING)
    weight_at = jax.vmap(jax.vmap(lambda w_L, t_C: w_L.at[t_C].get(mode="fill", fill_value=0)))
    weights_BEC = weight_at(weights_BLE.swapaxes(1, 2), tokens_BEC)
    taken_BL = jnp.sum(mine_BEL & (count_BEL <= size_B[:, None, None]), axis=1)
    return Slots(tokens_BEC, weights_BEC, taken_BL)


@jax.named_scope("experts")
def in_slots(x_BLD: jax.Array, slots: Slots, matrices: Matrices, activation: str) -> jax.Array:
    """Returns the weighted sum of the experts' outputs for the positions in slots, (B, L, D)."""

    def local(x_BLD, slots, matrices, split):
        batch, length, width = x_BLD.shape
        row_B11 = (length * jnp.arange(batch))[:, None, None]
        beyond = batch * length
        row_BEC = jnp.where(slots.tokens_BEC < length, row_B11 + slots.tokens_BEC, beyond)
        of_slots = row_BEC, slots.weights_BEC
        row_EZ, weight_EZ = (z.swapaxes(0, 1).reshape(z.shape[1], -1) for z in of_slots)
        x_TD = x_BLD.reshape(beyond, width)
        x_EZD = x_TD.at[row_EZ].get(mode="fill", fill_value=0)
        if split:
            x_EZD = jax.lax.all_to_all(x_EZD, "expert", 0, 1, tiled=True)
        product = functools.partial(jnp.einsum, "EZD,EDF->EZF")
        weight_EZ = weight_EZ.astype(x_EZD.dtype)
        if split:  # the weights do not travel
            back = functools.partial(jnp.einsum, "EZF,EDF->EZD")
            y_EZD = mlp(x_EZD, matrices, activation, product, back)
            y_EZD = jax.lax.all_to_all(y_EZD, "expert", 1, 0, tiled=True) * weight_EZ[..., None]
        else:
            back = functools.partial(weighted_product, weight_EZ=weight_EZ)
            y_EZD = mlp(x_EZD, matrices, activation, product, back)
        return jnp.zeros_like(x_TD).at[row_EZ].add(y_EZD, mode="drop").reshape(x_BLD.shape)

    return _on_each_device(local, x_BLD, slots, matrices, to_experts=True)


@jax.named_scope("experts")
def in_groups(x_BLD: jax.Array, picks: Picks, matrices: Matrices, activation: str) -> jax.Array:
    """Returns the weighted sum of the experts' outputs over all picks, (B, L, D)."""
    experts = jax.tree.leaves(matrices)[0].shape[0]

    def local(x_BLD, picks, matrices, _):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        expert_Y, weight_Y = picks.experts_BLP.reshape(-1), picks.weights_BLP.reshape(-1)
        order_Y = jnp.argsort(expert_Y, stable=True)
        row_Y = order_Y // picks.experts_BLP.shape[-1]
        sizes_E = jnp.sum(jax.nn.one_hot(expert_Y, experts, dtype=jnp.int32), axis=0)
        product = functools.partial(grouped_matmul, sizes_E=sizes_E)
        back = functools.partial(product, back=True)
        y_YD = mlp(x_TD[row_Y], matrices, activation, product, back)
        y_YD = y_YD * weight_Y[order_Y, None].astype(y_YD.dtype)
        return jnp.zeros_like(x_TD).at[row_Y].add(y_YD).reshape(x_BLD.shape)

    return _on_each_device(local, x_BLD, picks, matrices, to_experts=False)


def one_by_one(
    x_BLD: jax.Array, picks: Picks, experts: Sequence[Matrices], activation: str
) -> jax.Array:
    """Returns the result of `in_groups`, but reads only the weights of experts that are picked."""
    y_BLD = jnp.zeros_like(x_BLD)
    for e, matrices in enumerate(experts):
        mine_BLP = picks.experts_BLP == e
        weight_BL1 = jnp.sum(jnp.where(mine_BLP, picks.weights_BLP, 0.0), axis=2, keepdims=True)

        def add(y_BLD, matrices=matrices, weight_BL1=weight_BL1):
            found_BLD = mlp(x_BLD, matrices, activation, project, project_back)
            return y_BLD + weight_BL1.astype(x_BLD.dtype) * found_BLD

        y_BLD = jax.lax.cond(jnp.any(mine_BLP), add, lambda y_BLD: y_BLD, y_BLD)
    return y_BLD


def _on_each_device(
    local: Callable, x_BLD: jax.Array, routed: Any, matrices: Matrices, *, to_experts: bool
) -> jax.Array:
    """Returns local(x, routed, matrices, split), run by every device on its own rows.

    split: whether `matrices` are those of the device's own experts, so that rows must travel.
    to_experts: keep the experts split; False gathers the matrices of all experts on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or batch_shards(x_BLD.shape[0]) == 1:
        return local(x_BLD, routed, matrices, False)
    axes: list[Any] = [LOGICAL_TO_MESH[name] for name in MATRIX_AXES]
    axes = [axis if num_shards(mesh, axis) > 1 else None for axis in axes]
    rows = partition_spec(("batch",))

    def on_device(x_BLD, routed, matrices):
        gathered = {}
        for name, w_EDF in matrices.items():
            for dim, axis in enumerate(axes[:2]):
                if axis is not None and not (dim == 0 and to_experts):
                    w_EDF = jax.lax.all_gather(w_EDF, axis, axis=dim, tiled=True)
            gathered[name] = w_EDF
        y_BLD = local(x_BLD, routed, gathered, to_experts and axes[0] is not None)
        return y_BLD if axes[2] is None else jax.lax.psum(y_BLD, axes[2])

    in_specs = rows, rows, PartitionSpec(*axes)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=rows)
    return run(x_BLD, routed, matrices)
