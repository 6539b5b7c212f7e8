"""How the picks of a mixture of experts are computed: in slots, in groups, or expert by expert.

On a mesh every device works on its own rows. Experts lie over the `expert` axis: slots travel to
their expert's device and back; groups, which have no fixed size, have the experts come to them.

Legend: B batch, L positions, K picks of a position, E experts, C slots of an expert, N = B * C,
T = B * L rows, P = T * K picks, D model width, F expert width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from modjax.kernels import grouped_matmul, project, project_back
from modjax.nn.layers import mlp
from modjax.nn.sharding import LOGICAL_TO_MESH, batch_shards, partition_spec, ways

Matrices = Mapping[str, jax.Array]  # of an MLP, stacked over experts: (E, D, F)
MATRIX_AXES = ("experts", "embed", "mlp")


class Picks(NamedTuple):
    """The experts of each position, (B, L, K), E where a pick is of none; and their weights."""

    experts_BLK: jax.Array
    weights_BLK: jax.Array


class Slots(NamedTuple):
    """The positions that each expert takes, (B, E, C), L where a slot is empty; and weights."""

    tokens_BEC: jax.Array
    weights_BEC: jax.Array


def slots_of(picks: Picks, experts: int, size: int, size_B: jax.Array | None = None) -> Slots:
    """Returns each expert's first `size` positions: a position never displaces one before it.

    size_B: each row's own number, at most `size`.
    """
    mine_BLKE = jax.nn.one_hot(picks.experts_BLK, experts, dtype=bool)
    weights_BLE = jnp.sum(jnp.where(mine_BLKE, picks.weights_BLK[..., None], 0.0), axis=2)
    count_BEL = jnp.cumsum(jnp.any(mine_BLKE, axis=2), axis=1, dtype=jnp.int32).swapaxes(1, 2)
    find = functools.partial(jnp.searchsorted, v=jnp.arange(1, size + 1))
    tokens_BEC = jax.vmap(jax.vmap(find))(count_BEL)
    if size_B is not None:
        filled_B1C = jnp.arange(size)[None, None] < size_B[:, None, None]
        tokens_BEC = jnp.where(filled_B1C, tokens_BEC, count_BEL.shape[2])
    weight_at = jax.vmap(jax.vmap(lambda w_L, t_C: w_L.at[t_C].get(mode="fill", fill_value=0)))
    return Slots(tokens_BEC, weight_at(weights_BLE.swapaxes(1, 2), tokens_BEC))


def taken(slots: Slots, length: int) -> jax.Array:
    """Returns how many experts took each position, (B, L) int32."""
    batch = slots.tokens_BEC.shape[0]
    flat_BN = slots.tokens_BEC.reshape(batch, -1)
    add = jax.vmap(lambda t_N: jnp.zeros(length, jnp.int32).at[t_N].add(1, mode="drop"))
    return add(flat_BN)


def in_slots(x_BLD: jax.Array, slots: Slots, matrices: Matrices, activation: str) -> jax.Array:
    """Returns what the experts add at the positions in their slots, (B, L, D)."""

    def local(x_BLD, slots, matrices, experts_lie_apart):
        batch, length, width = x_BLD.shape
        row_B11 = (length * jnp.arange(batch))[:, None, None]
        beyond = batch * length
        row_BEC = jnp.where(slots.tokens_BEC < length, row_B11 + slots.tokens_BEC, beyond)
        row_EN, weight_EN = (
            z.swapaxes(0, 1).reshape(z.shape[1], -1) for z in (row_BEC, slots.weights_BEC)
        )
        x_TD = x_BLD.reshape(beyond, width)
        x_END = x_TD.at[row_EN].get(mode="fill", fill_value=0)
        if experts_lie_apart:
            x_END = jax.lax.all_to_all(x_END, "expert", 0, 1, tiled=True)
        y_END = mlp(
            x_END,
            matrices,
            activation,
            lambda x_END, w_EDF: jnp.einsum("END,EDF->ENF", x_END, w_EDF),
            lambda x_ENF, w_EDF: jnp.einsum("ENF,EDF->END", x_ENF, w_EDF),
        )
        if experts_lie_apart:
            y_END = jax.lax.all_to_all(y_END, "expert", 1, 0, tiled=True)
        y_END = y_END * weight_EN[..., None].astype(y_END.dtype)
        return jnp.zeros_like(x_TD).at[row_EN].add(y_END, mode="drop").reshape(x_BLD.shape)

    return _on_each_device(local, x_BLD, slots, matrices, to_experts=True)


def in_groups(x_BLD: jax.Array, picks: Picks, matrices: Matrices, activation: str) -> jax.Array:
    """Returns what the experts add to every position that picked them, (B, L, D)."""
    experts = jax.tree.leaves(matrices)[0].shape[0]

    def local(x_BLD, picks, matrices, _):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        expert_P, weight_P = picks.experts_BLK.reshape(-1), picks.weights_BLK.reshape(-1)
        order_P = jnp.argsort(expert_P, stable=True)
        row_P = order_P // picks.experts_BLK.shape[-1]
        sizes_E = jnp.sum(jax.nn.one_hot(expert_P, experts, dtype=jnp.int32), axis=0)
        y_PD = mlp(
            x_TD[row_P],
            matrices,
            activation,
            lambda x_PD, w_EDF: grouped_matmul(x_PD, w_EDF, sizes_E),
            lambda x_PF, w_EDF: grouped_matmul(x_PF, w_EDF, sizes_E, back=True),
        )
        y_PD = y_PD * weight_P[order_P, None].astype(y_PD.dtype)
        return jnp.zeros_like(x_TD).at[row_P].add(y_PD).reshape(x_BLD.shape)

    return _on_each_device(local, x_BLD, picks, matrices, to_experts=False)


def one_by_one(
    x_BLD: jax.Array, picks: Picks, experts: Sequence[Matrices], activation: str
) -> jax.Array:
    """The same of few positions: reads the weights of the experts that are picked, no others."""
    y_BLD = jnp.zeros_like(x_BLD)
    for e, matrices in enumerate(experts):
        mine_BLK = picks.experts_BLK == e
        weight_BL1 = jnp.sum(jnp.where(mine_BLK, picks.weights_BLK, 0.0), axis=2, keepdims=True)

        def add(y_BLD, matrices=matrices, weight_BL1=weight_BL1):
            found_BLD = mlp(x_BLD, matrices, activation, project, project_back)
            return y_BLD + weight_BL1.astype(x_BLD.dtype) * found_BLD

        y_BLD = jax.lax.cond(jnp.any(mine_BLK), add, lambda y_BLD: y_BLD, y_BLD)
    return y_BLD


def _on_each_device(
    local: Callable, x_BLD: jax.Array, routed: Any, matrices: Matrices, *, to_experts: bool
) -> jax.Array:
    """local(x, routed, matrices, whether experts lie apart) of each device's rows.

    Matrices come to the rows, but for the experts' dim where rows go to_experts.
    """
    matrices = {name: w_EDF.astype(x_BLD.dtype) for name, w_EDF in matrices.items()}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or batch_shards(x_BLD.shape[0]) == 1:
        return local(x_BLD, routed, matrices, False)
    axes: list[Any] = [LOGICAL_TO_MESH[name] for name in MATRIX_AXES]
    axes = [axis if ways(mesh, axis) > 1 else None for axis in axes]
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

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(rows, rows, PartitionSpec(*axes)),
        out_specs=rows,
    )(x_BLD, routed, matrices)
