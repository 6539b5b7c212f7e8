"""The blocks that a pattern names: dense, and dense within a router.

Legend: B batch, L positions, D model width, N heads, G kv heads, H head width.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from flax import nnx

from modjax.config import ModelConfig
from modjax.nn.attention import Attention, causal_attention, received_attention
from modjax.nn.cache import KVCache, append, cached_attention
from modjax.nn.layers import MLP, RMSNorm
from modjax.nn.mod import MoDBlock
from modjax.nn.routers import ROUTERS


class Context(NamedTuple):
    """What belongs to each position beside its activation; a routed block gathers all of it.

    rope_BLH: cos and sin of the original positions, each H/2 wide. segment_ids_BL: None, or
    attention stays within equal ids.
    """

    rope_BLH: tuple[jax.Array, jax.Array]
    segment_ids_BL: jax.Array | None


class DenseBlock(nnx.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        # GPT-2's rule: the 2 * num_layers additions to the stream start with total variance 1.
        depth = math.sqrt(2 * config.num_layers)
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads,
            output_std=1 / math.sqrt(config.d_model) / depth, rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(
            config.d_model, config.d_ff, activation=config.mlp,
            output_std=1 / math.sqrt(config.d_ff) / depth, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        return self.prefill(x_BLD, context)[0]

    def ranked(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The call, and the attention that each position received, (B, L)."""
        q_BNLH, k_BGLH, v_BGLH = self._heads(x_BLD, context)
        received_BL = received_attention(q_BNLH, k_BGLH, context.segment_ids_BL)
        out_BNLH = causal_attention(q_BNLH, k_BGLH, v_BGLH, context.segment_ids_BL)
        return self._add(x_BLD, out_BNLH), received_BL

    def prefill(
        self, x_BLD: jax.Array, context: Context
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The call, and its keys and values (B, G, L, H)."""
        q_BNLH, k_BGLH, v_BGLH = self._heads(x_BLD, context)
        out_BNLH = causal_attention(q_BNLH, k_BGLH, v_BGLH, context.segment_ids_BL)
        return self._add(x_BLD, out_BNLH), (k_BGLH, v_BGLH)

    def decode(
        self, x_B1D: jax.Array, context: Context, cache: KVCache, write_B: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """One token per row after those in `cache`, which keeps it in the rows of `write_B`."""
        q_BN1H, k_BG1H, v_BG1H = self._heads(x_B1D, context)
        # Written before it is read: XLA copies a cache that is read and then written.
        cache = append(cache, k_BG1H, v_BG1H, write_B)
        return self._add(x_B1D, cached_attention(q_BN1H, cache)), cache

    def _heads(self, x_BLD, context):
        return self.attention.heads(self.attention_norm(x_BLD), context.rope_BLH)

    def _add(self, x_BLD, out_BNLH):
        x_BLD = x_BLD + self.attention.merge(out_BNLH)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


def make_block(config: ModelConfig, kind: str, capacity: float, rngs: nnx.Rngs) -> nnx.Module:
    """The block that an entry of the pattern names."""
    block = DenseBlock(config, rngs=rngs)
    if kind == "dense":
        return block
    # Only where the score orders the positions by what they hold can it learn to select them.
    auxiliary = config.mod.auxiliary_weight if kind == "mod" else 0.0
    mod = dataclasses.replace(config.mod, capacity=capacity, auxiliary_weight=auxiliary)
    return MoDBlock(block, config.d_model, mod, rngs=rngs, router=ROUTERS[kind])
