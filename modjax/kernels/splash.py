"""Attention on TPUs, by JAX's Pallas kernel "splash attention".

The scores stay in the chip's vector memory, and blocks that the mask hides are left out.

Legend: B batch, L positions, N heads, G kv heads, H head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.kernels.scoring import KEY_AXES, QUERY_AXES, Scoring, Side
from modjax.sharding import on_each_shard
from modjax.specs.masks import Causal, Mask

LANES = 128  # numbers of a vector register; lengths and head widths are multiples of it
BLOCK = 1024  # the most queries or keys of a block
HIDDEN = -1  # the segment of keys that are not valid


def applies(q_BNLH: jax.Array, scoring: Scoring, queries: Side, layout: str) -> bool:
    """Returns whether the kernel can compute this attention, over the queries' own positions.

    The kernel's mask knows places in the arrays, not positions. A causal mask needs only their
    order. Others need all positions, and no hidden keys between them.
    """
    causal = type(scoring.mask) is Causal
    whole = layout == "whole" and queries.valid_BL is None
    _, _, length, head_dim = q_BNLH.shape
    return (causal or whole) and length >= LANES and head_dim % LANES == 0


def attend(
    q_BNLH: jax.Array,
    k_BGLH: jax.Array,
    v_BGLH: jax.Array,
    scoring: Scoring,
    queries: Side,
    layout: str,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns `modjax.kernels.attend` where `applies`. interpret: run it anywhere, but slowly."""
    batch, _, length, head_dim = q_BNLH.shape
    q_BNLH = q_BNLH * jnp.asarray(scoring.factor(head_dim), q_BNLH.dtype)
    segments, segments_BL, seen_BL = (), queries.segments_BL, None
    valid_BL = queries.valid_BL if layout == "masked" else None  # others come last
    if segments_BL is not None or valid_BL is not None:
        segments_BL = 0 if segments_BL is None else segments_BL
        q_BL = jnp.broadcast_to(segments_BL, (batch, length)).astype(jnp.int32)
        segments = q_BL, q_BL
        if valid_BL is not None:
            seen_BL = _see_a_key(q_BL, valid_BL)
            segments = q_BL, jnp.where(valid_BL, q_BL, HIDDEN)
    call = functools.partial(_call, scoring=scoring, interpret=interpret)
    rows = [("batch", None)] * len(segments)
    axes = QUERY_AXES, KEY_AXES, KEY_AXES, *rows
    out_BNLH = on_each_shard(call, axes, QUERY_AXES, q_BNLH, k_BGLH, v_BGLH, *segments)
    if seen_BL is None:
        return out_BNLH
    return jnp.where(seen_BL[:, None, :, None], out_BNLH, jnp.zeros_like(out_BNLH))


def _call(
    q_BNLH: jax.Array,
    k_BGLH: jax.Array,
    v_BGLH: jax.Array,
    *segments: jax.Array,
    scoring: Scoring,
    interpret: bool,
) -> jax.Array:
    """Returns attention with scale 1, of one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # slow to import

    heads, length = q_BNLH.shape[1:3]
    share = -(-length // -(-length // BLOCK))  # of the fewest blocks, which are equal
    block = share + -share % LANES
    more = -length % block
    # Padding comes last: a causal mask hides it, and so does a segment of its own.
    if more and not segments and type(scoring.mask) is not Causal:
        segments = (jnp.zeros((q_BNLH.shape[0], length), jnp.int32),) * 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q_BNLH, k_BGLH, v_BGLH))
    ids = [jnp.pad(x, ((0, 0), (0, more)), constant_values=HIDDEN - 1) for x in segments]
    kernel: Any = _kernel(scoring.mask, scoring.softcap, heads, length + more, block, interpret)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if ids:
            out = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, SegmentIds(*ids)))(q, k, v, *ids)
        else:
            out = jax.vmap(kernel)(q, k, v)
    return out[:, :, :length].astype(q_BNLH.dtype)


def _kernel(
    mask: Mask, softcap: float | None, heads: int, length: int, block: int, interpret: bool
):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class Seen(splash.Mask):
        """The mask of modjax at the positions 0, 1, ..."""

        @property
        def shape(self) -> tuple[int, ...]:
            return length, length

        def __getitem__(self, places) -> np.ndarray:
            query_L, key_L = (np.arange(length)[place] for place in places)
            return np.asarray(mask.seen(query_L[:, None], key_L[None]))

        def __eq__(self, other) -> bool:
            return type(self) is type(other)

        def __hash__(self) -> int:
            return hash(mask)

    one = splash.CausalMask((length, length)) if type(mask) is Causal else Seen()
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="context",
        interpret=interpret,
    )


def _see_a_key(segments_BL: jax.Array, valid_BL: jax.Array) -> jax.Array:
    """Returns which queries see a valid key of their segment under a causal mask, (B, L) bool."""
    keys_BL = jnp.cumsum(valid_BL, axis=1, dtype=jnp.int32)
    begins_BL = segments_BL != jnp.roll(segments_BL, 1, axis=1)
    before_BL = jnp.where(begins_BL, keys_BL - valid_BL.astype(jnp.int32), 0)
    return keys_BL > jax.lax.cummax(before_BL, axis=1)
