"""A decoder: a repeating pattern of blocks between an embedding and logits.

Legend: B batch, L positions, D model width, H head width, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.config import ModelConfig
from modjax.nn.attention import Attention
from modjax.nn.layers import MLP, RMSNorm, normal_param, project, rotary_tables
from modjax.nn.mod import MoDBlock, StochasticMoDBlock
from modjax.nn.sharding import constrain

Aux = dict[str, dict[str, jax.Array]]


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
        h_BLD = self.attention_norm(x_BLD)
        x_BLD = x_BLD + self.attention(h_BLD, context.rope_BLH, context.segment_ids_BL)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


# What a pattern can name: (ModelConfig, MoDConfig of the slot, rngs) to a block.
BLOCKS: dict[str, Callable[..., nnx.Module]] = {
    "dense": lambda c, mod, rngs: DenseBlock(c, rngs=rngs),
    "mod": lambda c, mod, rngs: MoDBlock(DenseBlock(c, rngs=rngs), c.d_model, mod, rngs=rngs),
    "stochastic": lambda c, mod, rngs: StochasticMoDBlock(
        DenseBlock(c, rngs=rngs), c.d_model, mod, rngs=rngs
    ),
}


class Transformer(nnx.Module):
    """Tokens to next-token logits; `config.pattern` repeated `config.num_groups` times.

    The parameters of each pattern slot are stacked over its repetitions (logical axis "layers"),
    whichever loop runs them. layer_loop: "scan", "unroll" or "auto" (unrolled on CPU).
    remat: "none", "dots" (matrix products are kept) or "full" (each group is recomputed).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        layer_loop: str = "auto",
        remat: str = "none",
    ):
        self.config = config
        self.layer_loop = layer_loop
        self.remat = remat
        d, v = config.d_model, config.vocab_size
        # A tied table also serves as the output projection, whose logits should start near 1.
        std = 1 / math.sqrt(d)
        self.embedding = normal_param(
            rngs, (v, d), ("vocab", "embed"), std=std if config.tie_embeddings else 1.0
        )
        blocks = {}
        for i, slot in enumerate(config.slots):
            mod = dataclasses.replace(config.mod, capacity=slot.capacity)
            stacked = nnx.vmap(
                functools.partial(BLOCKS[slot.kind], config, mod),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            with nnx.split_rngs(rngs, splits=config.num_groups):
                blocks[f"{i}_{slot.kind}"] = stacked(rngs)
        self.blocks = nnx.Dict(blocks)
        self.final_norm = RMSNorm(d, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.w_logits = normal_param(rngs, (d, v), ("embed", "vocab"), std=std)

    def __call__(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Logits (B, L, V) in float32, and the aux of every routed slot stacked over groups.

        segment_ids_BL: attention stays within equal ids, 0 is padding (never routed).
        key: PRNG key, needed by random routing only.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        positions_1L = jnp.arange(tokens_BL.shape[1])[None]
        rope_1LH = rotary_tables(positions_1L, config.head_dim, config.rope_base, dtype)
        context = Context(rope_1LH, segment_ids_BL)
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        table_VD = constrain(self.embedding.astype(dtype), "vocab", None)
        x_BLD = constrain(table_VD[tokens_BL], "batch", "length", None)
        x_BLD, aux = self._layers(x_BLD, context, valid_BL, key)
        x_BLD = self.final_norm(x_BLD)
        w_DV = self.embedding.T if config.tie_embeddings else self.w_logits[...]
        return project(x_BLD, w_DV, jnp.float32), aux

    def _layers(self, x_BLD, context, valid_BL, key):
        graphdef, stacked = nnx.split(self.blocks)

        def group(x_BLD, params_and_index):
            params, index = params_and_index
            blocks = nnx.merge(graphdef, params)
            aux: Aux = {}
            for i, slot in enumerate(self.config.slots):
                name = f"{i}_{slot.kind}"
                block = blocks[name]
                if isinstance(block, MoDBlock):
                    block_key = None if key is None else jax.random.fold_in(
                        jax.random.fold_in(key, index), i)  # fmt: skip
                    x_BLD, aux[name] = block(x_BLD, context, valid_BL=valid_BL, key=block_key)
                else:
                    x_BLD = block(x_BLD, context)
                x_BLD = constrain(x_BLD, "batch", "length", None)
            return x_BLD, aux

        if self.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            group = jax.checkpoint(group, policy=dots if self.remat == "dots" else None)
        groups = self.config.num_groups
        unroll = self.layer_loop == "unroll" or (
            self.layer_loop == "auto" and jax.default_backend() == "cpu"
        )
        if not unroll:
            return jax.lax.scan(group, x_BLD, (stacked, jnp.arange(groups)))
        # lax.split transposes to one concatenation; indexing would pad and add every gradient.
        layers = [
            jax.tree.unflatten(jax.tree.structure(stacked), [part[0] for part in leaves])
            for leaves in zip(
                *(jax.lax.split(leaf, [1] * groups) for leaf in jax.tree.leaves(stacked)),
                strict=True,
            )
        ]
        per_group = []
        for index, params in enumerate(layers):
            x_BLD, aux = group(x_BLD, (params, index))
            per_group.append(aux)
        return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_group)
