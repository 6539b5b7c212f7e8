"""Attention on NVIDIA GPUs, by cuDNN's fused kernel.

Legend: B batch, L positions, N heads, G kv heads, H head width.
"""

import jax
import jax.numpy as jnp

from modjax.kernels.scoring import KEY_AXES, QUERY_AXES, Scoring, Side
from modjax.sharding import on_each_shard
from modjax.specs.masks import Bidirectional, Both, Causal, Mask, Window

WIDEST = 128  # head width; 256 on Hopper and later


def applies(q_BNLH: jax.Array, scoring: Scoring, queries: Side, layout: str) -> bool:
    """Returns whether the kernel can compute this attention, over the queries' own positions.

    It knows causal masks and windows by places in the arrays, and neither segments nor hidden keys.
    With a mask of pairs it is slow, and with packed documents wrong for grouped queries in jax
    0.10.2.
    """
    known = queries.segments_BL is None and scoring.softcap is None
    half, head_dim = q_BNLH.dtype in (jnp.bfloat16, jnp.float16), q_BNLH.shape[-1]
    if not (known and half and head_dim % 8 == 0 and head_dim <= WIDEST):
        return False
    if type(scoring.mask) is Causal:
        return layout != "masked" or queries.valid_BL is None
    whole = layout == "whole" and queries.valid_BL is None
    return whole and (type(scoring.mask) is Bidirectional or _window(scoring.mask) is not None)


def attend(
    q_BNLH: jax.Array,
    k_BGLH: jax.Array,
    v_BGLH: jax.Array,
    scoring: Scoring,
    queries: Side,
    layout: str,
) -> jax.Array:
    """Returns `modjax.kernels.attend` where `applies`."""
    window = _window(scoring.mask)

    def call(*tensors: jax.Array) -> jax.Array:
        q_BLNH, k_BLGH, v_BLGH = (x.swapaxes(1, 2) for x in tensors)
        out_BLNH = jax.nn.dot_product_attention(
            q_BLNH,
            k_BLGH,
            v_BLGH,
            scale=scoring.factor(q_BNLH.shape[-1]),
            is_causal=scoring.mask.reach[1] == 0,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
        return out_BLNH.swapaxes(1, 2)

    axes = QUERY_AXES, KEY_AXES, KEY_AXES
    return on_each_shard(call, axes, QUERY_AXES, q_BNLH, k_BGLH, v_BGLH)


def _window(mask: Mask) -> int | None:
    """Returns the size of a causal window, or None for other masks."""
    if isinstance(mask, Both) and type(mask.one) is Causal and type(mask.other) is Window:
        return mask.other.size
    return None
