"""Products of rows with the matrix of their group, an expert, at the cost of the rows present.

`jax.lax.ragged_dot` multiplies every row with every matrix on a CPU, and for the gradient of the
matrices on a TPU. Here a loop over blocks of rows runs on CPUs and GPUs, and JAX's kernel
"megablox" (MegaBlocks, arXiv 2211.15841) on TPUs.

Legend: T rows, E experts, D model width, F feed-forward width, Z rows of a block.
"""

import functools

import jax
import jax.numpy as jnp

from modjax.kernels.target import target
from modjax.kernels.varying import varies_over, varying, varying_alike

# Rows that are multiplied at once: few waste little on a group's last block.
BLOCK = {"cpu": 64, "gpu": 512}
TILE = 128  # rows of a tile of megablox; its other two dims are at most MOST
MOST = 512


def grouped_matmul(
    x_TD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    back: bool = False,
    kernel: str | None = None,
) -> jax.Array:
    """Returns x @ w[e] for the rows of each group e, (T, F). Groups lie one after another.

    sizes_E: rows of each group, int32. Rows after the last group give 0 and get no gradient.
    back: takes x (T, F) and returns x @ w[e].T, (T, D).
    kernel: "blocks"; "megablox", for TPUs; or "interpreted", megablox anywhere, but slowly. None
      chooses by the platform.
    """
    if kernel is None:
        kernel = "megablox" if target() == "tpu" else "blocks"
    w_EDF = w_EDF.astype(x_TD.dtype)
    return _grouped(*varying_alike(x_TD, w_EDF, sizes_E), back, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x_TD, w_EDF, sizes_E, back, kernel):
    if kernel == "blocks":
        out_TF = _multiply_by_blocks(x_TD, w_EDF, sizes_E, back)
    else:
        out_TF = _multiply_by_megablox(x_TD, w_EDF, sizes_E, back, kernel)
    return jnp.where(_in_groups(x_TD, sizes_E), out_TF, 0)


def _forward(x_TD, w_EDF, sizes_E, back, kernel):
    return _grouped(x_TD, w_EDF, sizes_E, back, kernel), (x_TD, w_EDF, sizes_E)


def _backward(back, kernel, inputs, dy_TF):
    x_TD, w_EDF, sizes_E = inputs
    dx_TD = _grouped(dy_TF, w_EDF, sizes_E, not back, kernel)
    left, right = (dy_TF, x_TD) if back else (x_TD, dy_TF)
    if kernel == "blocks":
        dw_EDF = _sum_by_blocks(left, right, sizes_E)
    else:
        dw_EDF = _sum_by_megablox(left, right, sizes_E, kernel)
    return dx_TD, dw_EDF.astype(w_EDF.dtype), None


_grouped.defvjp(_forward, _backward)


def _multiply_by_megablox(x_TD, w_EDF, sizes_E, back, kernel):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # slow to import

    x, sizes, dtype = _to_tiles(x_TD, sizes_E), _all_rows(x_TD, sizes_E), x_TD.dtype
    tile = min(MOST, *w_EDF.shape[1:])
    how = {"transpose_rhs": back, "interpret": kernel == "interpreted"}
    with jax.numpy_dtype_promotion("standard"):
        return gmm(x, w_EDF, sizes, dtype, (TILE, tile, tile), **how)[: x_TD.shape[0]]


def _sum_by_megablox(x_TD, y_TF, sizes_E, kernel):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, y, sizes = _to_tiles(x_TD, sizes_E).T, _to_tiles(y_TF, sizes_E), _all_rows(x_TD, sizes_E)
    tile = min(MOST, x_TD.shape[1], y_TF.shape[1])
    how = {"num_actual_groups": sizes_E.shape[0], "interpret": kernel == "interpreted"}
    with jax.numpy_dtype_promotion("standard"):
        return tgmm(x, y, sizes, jnp.float32, (TILE, tile, tile), **how)


def _in_groups(x_TD, sizes_E):
    """Returns which rows belong to a group, (T, 1) bool."""
    return (jnp.arange(x_TD.shape[0]) < jnp.sum(sizes_E))[:, None]


def _to_tiles(x_TD, sizes_E):
    """Pads to whole tiles of rows. Rows outside every group become 0."""
    x_TD = jnp.where(_in_groups(x_TD, sizes_E), x_TD, 0)
    return jnp.pad(x_TD, ((0, -x_TD.shape[0] % TILE), (0, 0)))


def _all_rows(x_TD, sizes_E):
    """Adds the padding rows to the last group: the kernel leaves rows outside uninitialised."""
    rows = x_TD.shape[0] + -x_TD.shape[0] % TILE
    return sizes_E.at[-1].add(rows - jnp.sum(sizes_E))


def _multiply_by_blocks(x_TD, w_EDF, sizes_E, back):
    """Multiplies each group block by block, so that the work follows the sizes."""
    rows, width = x_TD.shape[0], w_EDF.shape[1 if back else 2]
    block, starts_E, _ = _layout(rows, sizes_E)
    x_TD = jnp.pad(x_TD, ((0, block), (0, 0)))

    def group(e, out_TF):
        w_DF = w_EDF[e].T if back else w_EDF[e]

        def one(i, out_TF):
            start = starts_E[e] + i * block
            x_ZD = jax.lax.dynamic_slice_in_dim(x_TD, start, block)
            # A block's rows beyond its group are overwritten by the next group.
            return jax.lax.dynamic_update_slice_in_dim(out_TF, x_ZD @ w_DF, start, 0)

        return jax.lax.fori_loop(0, -(-sizes_E[e] // block), one, out_TF)

    out_TF = varying(jnp.zeros((rows + block, width), x_TD.dtype), varies_over(x_TD))
    return jax.lax.fori_loop(0, w_EDF.shape[0], group, out_TF)[:rows]


def _sum_by_blocks(x_TD, y_TF, sizes_E):
    """Returns x.T @ y of the rows of each group, (E, D, F)."""
    block, starts_E, ends_E = _layout(x_TD.shape[0], sizes_E)
    x_TD, y_TF = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_TD, y_TF))

    def group(_, e):
        def one(i, sum_DF):
            start = starts_E[e] + i * block
            x_ZD, y_ZF = (jax.lax.dynamic_slice_in_dim(z, start, block) for z in (x_TD, y_TF))
            mine_Z1 = (start + jnp.arange(block) < ends_E[e])[:, None]
            x_DZ = jnp.where(mine_Z1, x_ZD, 0).T
            return sum_DF + jnp.matmul(x_DZ, y_ZF, preferred_element_type=jnp.float32)

        zero_DF = jnp.zeros((x_TD.shape[1], y_TF.shape[1]), jnp.float32)
        zero_DF = varying(zero_DF, varies_over(x_TD))
        return None, jax.lax.fori_loop(0, -(-sizes_E[e] // block), one, zero_DF)

    return jax.lax.scan(group, None, jnp.arange(sizes_E.shape[0]))[1]


def _layout(rows: int, sizes_E: jax.Array) -> tuple[int, jax.Array, jax.Array]:
    """Returns the rows of a block, and where each group starts and ends."""
    ends_E = jnp.cumsum(sizes_E)
    return min(BLOCK.get(target(), BLOCK["cpu"]), rows), ends_E - sizes_E, ends_E
