"""Products of rows with the matrix of their group, an expert, at the cost of the rows present.

`jax.lax.ragged_dot` multiplies every row with every matrix on a CPU, and for the gradient of the
matrices on a TPU.

Legend: T rows, E experts, D model width, F feed-forward width, Z rows of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from modjax.kernels.target import target

# Rows that are multiplied at once: few waste little on a group's last block.
BLOCK = {"cpu": 64, "gpu": 512}
TILE = 128  # of megablox, in rows


def grouped_matmul(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    back: bool = False,
    kernel: str | None = None,
) -> jax.Array:
    """Returns x @ w[e] for the rows of each group e, which lie one after another, (T, F).

    sizes_E: rows of each group, int32; rows after the last group give 0, and get no gradient.
    back: takes x (T, F) and gives x @ w[e].T, (T, D).
    kernel: "megablox", of JAX for TPUs; "interpreted", the same anywhere, slowly; or "blocks".
      None: what suits the devices.
    """
    if kernel is None:
        kernel = "megablox" if target() == "tpu" else "blocks"
    w_EDF = w_EDF.astype(x_TD.dtype)
    axes = _axes(x_TD) | _axes(w_EDF) | _axes(sizes_E)
    x_TD, w_EDF, sizes_E = (_varying(z, axes) for z in (x_TD, w_EDF, sizes_E))
    return _grouped(x_TD, w_EDF, sizes_E, back, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_TD, w_EDF, sizes_E, back, kernel):
    multiply = _by_blocks if kernel == "blocks" else functools.partial(_by_megablox, kernel)
    out_TF = multiply(x_TD, w_EDF, sizes_E, back)
    return jnp.where((jnp.arange(x_TD.shape[0]) < jnp.sum(sizes_E))[:, None], out_TF, 0)


def _forward(x_TD, w_EDF, sizes_E, back, kernel):
    return _grouped(x_TD, w_EDF, sizes_E, back, kernel), (x_TD, w_EDF, sizes_E)


def _backward(back, kernel, kept, dy_TF):
    x_TD, w_EDF, sizes_E = kept
    dx_TD = _grouped(dy_TF, w_EDF, sizes_E, not back, kernel)
    add_up = _summed if kernel == "blocks" else functools.partial(_summed_by_megablox, kernel)
    dw_EDF = add_up(*((dy_TF, x_TD) if back else (x_TD, dy_TF)), sizes_E)
    return dx_TD, dw_EDF.astype(w_EDF.dtype), None


_grouped.defvjp(_forward, _backward)


def _by_megablox(kernel, x_TD, w_EDF, sizes_E, back):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # slow to import

    tiles = (TILE, *[min(512, *w_EDF.shape[1:])] * 2)
    with jax.numpy_dtype_promotion("standard"):
        return gmm(
            _tiled(x_TD, sizes_E),
            w_EDF,
            _all_rows(x_TD, sizes_E),
            x_TD.dtype,
            tiles,
            transpose_rhs=back,
            interpret=kernel == "interpreted",
        )[: x_TD.shape[0]]


def _summed_by_megablox(kernel, x_TD, y_TF, sizes_E):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiles = (TILE, *[min(512, x_TD.shape[1], y_TF.shape[1])] * 2)
    with jax.numpy_dtype_promotion("standard"):
        return tgmm(
            _tiled(x_TD, sizes_E).T,
            _tiled(y_TF, sizes_E),
            _all_rows(x_TD, sizes_E),
            jnp.float32,
            tiles,
            num_actual_groups=sizes_E.shape[0],
            interpret=kernel == "interpreted",
        )


def _tiled(x_TD, sizes_E):
    """Pads to whole tiles of rows; rows without a group become 0."""
    rows = x_TD.shape[0]
    mine_T1 = (jnp.arange(rows) < jnp.sum(sizes_E))[:, None]
    return jnp.pad(jnp.where(mine_T1, x_TD, 0), ((0, -rows % TILE), (0, 0)))


def _all_rows(x_TD, sizes_E):
    """Adds the rows outside every group to the last; the kernel leaves them uninitialised."""
    rows = x_TD.shape[0] + -x_TD.shape[0] % TILE
    return sizes_E.at[-1].add(rows - jnp.sum(sizes_E))


def _by_blocks(x_TD, w_EDF, sizes_E, back):
    """Multiplies each group block by block, so that the work follows the sizes."""
    rows, width = x_TD.shape[0], w_EDF.shape[1 if back else 2]
    block, starts_E, _ = _laid_out(rows, sizes_E)
    x_TD = jnp.pad(x_TD, ((0, block), (0, 0)))

    def group(e, out_TF):
        w_DF = w_EDF[e].T if back else w_EDF[e]

        def one(i, out_TF):
            start = starts_E[e] + i * block
            x_ZD = jax.lax.dynamic_slice_in_dim(x_TD, start, block)
            # What a block has too many is overwritten by the group that it belongs to.
            return jax.lax.dynamic_update_slice_in_dim(out_TF, x_ZD @ w_DF, start, 0)

        return jax.lax.fori_loop(0, -(-sizes_E[e] // block), one, out_TF)

    out_TF = _varying(jnp.zeros((rows + block, width), x_TD.dtype), _axes(x_TD))
    return jax.lax.fori_loop(0, w_EDF.shape[0], group, out_TF)[:rows]


def _summed(x_TD, y_TF, sizes_E):
    """Returns x.T @ y of the rows of each group, (E, D, F)."""
    block, starts_E, ends_E = _laid_out(x_TD.shape[0], sizes_E)
    x_TD, y_TF = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_TD, y_TF))

    def group(_, e):
        def one(i, sum_DF):
            start = starts_E[e] + i * block
            x_ZD, y_ZF = (jax.lax.dynamic_slice_in_dim(z, start, block) for z in (x_TD, y_TF))
            mine_Z1 = (start + jnp.arange(block) < ends_E[e])[:, None]
            product_DF = jnp.matmul(
                jnp.where(mine_Z1, x_ZD, 0).T, y_ZF, preferred_element_type=jnp.float32
            )
            return sum_DF + product_DF

        zero_DF = jnp.zeros((x_TD.shape[1], y_TF.shape[1]), jnp.float32)
        zero_DF = _varying(zero_DF, _axes(x_TD))
        return None, jax.lax.fori_loop(0, -(-sizes_E[e] // block), one, zero_DF)

    return jax.lax.scan(group, None, jnp.arange(sizes_E.shape[0]))[1]


def _axes(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes between whose devices x differs, inside a shard_map."""
    return jax.typeof(x).manual_axis_type.varying  # type: ignore[attr-defined]


def _varying(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Returns x, marked as differing between the devices of these mesh axes as well."""
    more = tuple(axes - _axes(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def _laid_out(rows: int, sizes_E):
    """Returns the rows of a block, and where each group starts and ends."""
    ends_E = jnp.cumsum(sizes_E)
    return min(BLOCK.get(target(), BLOCK["cpu"]), rows), ends_E - sizes_E, ends_E
