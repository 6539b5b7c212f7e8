"""A decoder: a repeating pattern of blocks between an embedding and logits.

Legend: B batch, L positions, D model width, H head width, V vocabulary, G groups, M max_length.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.config import ModelConfig, Slot, require
from modjax.flops import cache_slots
from modjax.nn.block import Context, make_block
from modjax.nn.cache import KVCache, filled
from modjax.nn.layers import RMSNorm, normal_param, product, rotary_tables
from modjax.nn.mod import BlockAux, MoDBlock
from modjax.nn.sharding import constrain

Aux = dict[str, BlockAux]


class Cache(NamedTuple):
    """What decoding keeps: layer by layer, and the position of each row's next token."""

    layers: tuple[KVCache, ...]
    positions_B: jax.Array

    @property
    def overflow_B(self) -> jax.Array:
        """Tokens that found no slot until now, summed over the layers."""
        return sum((layer.overflow_B for layer in self.layers), jnp.zeros_like(self.positions_B))


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
        for name, slot in self._slots():
            stacked = nnx.vmap(
                functools.partial(make_block, config, slot.kind, slot.capacity),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            with nnx.split_rngs(rngs, splits=config.num_groups):
                blocks[name] = stacked(rngs)
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
        routing: str = "top_k",
        slack: float | None = None,
    ) -> tuple[jax.Array, Aux]:
        """Logits (B, L, V) in float32, and the aux of every routed slot stacked over groups.

        segment_ids_BL: attention stays within equal ids, 0 is padding (never routed).
        key: PRNG key, needed by random routing only.
        routing: "top_k" as in training, or "router", "predictor", "paced" or "threshold", which
          never look ahead. slack: with these, a routed block takes the first slack * capacity * L
          positions of a row at most; None, all that ask.
        Raises InputError for a routing that the model has not learned.
        """
        self.config.check_routing(routing, "routing")
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        length = tokens_BL.shape[1]
        context = self._context(jnp.arange(length)[None], segment_ids_BL)

        def group(blocks, x_BLD, index):
            aux: Aux = {}
            received_BL = None
            for i, (name, slot) in enumerate(self._slots()):
                block = blocks[name]
                if isinstance(block, MoDBlock):
                    x_BLD, aux[name] = block(
                        x_BLD, context, valid_BL=valid_BL, key=_block_key(key, index, i),
                        received_BL=received_BL, routing=routing,
                        slots=cache_slots(slot.capacity, length, slack),
                    )  # fmt: skip
                elif self._ranks(i + 1):
                    x_BLD, received_BL = block.ranked(x_BLD, context)
                else:
                    x_BLD = block(x_BLD, context)
                x_BLD = constrain(x_BLD, "batch", "length", None)
            return x_BLD, aux

        x_BLD, aux = self._groups(self._embed(tokens_BL), group)
        return self._logits(x_BLD), aux

    def prefill(
        self,
        tokens_BL: jax.Array,
        lengths_B: jax.Array,
        *,
        max_length: int,
        routing: str,
        slack: float | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Reads prompts: logits (B, V) after their last token, caches, and depths_BL.

        tokens_BL: row b holds lengths_B[b] >= 1 tokens, and then padding.
        max_length: of prompt and continuation. routing, slack: see the call; under "top_k", which
          looks ahead, a continuation is no honest sample. A routed block's cache has room for
          slack * capacity * max_length tokens of a row.
        depths_BL: how many routed blocks processed each position.
        Raises InputError for a routing that the model has not learned.
        """
        self.config.check_routing(routing, "routing")
        if routing == "top_k":
            kinds = [slot.kind for slot in self.config.slots]
            require("attention" not in kinds, "routing", routing, "attention blocks rank by what "
                    "comes later: prefill needs another routing")  # fmt: skip
            require(slack is None or slack >= 1, "slack", slack, "must be 1 or more under top_k")
        valid_BL = jnp.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
        # Padding comes after everything real: causal attention never sees it.
        context = self._context(jnp.arange(tokens_BL.shape[1])[None], None)

        def group(blocks, x_BLD, index):
            caches: list[KVCache] = []
            depth_BL = jnp.zeros(tokens_BL.shape, jnp.int32)
            for i, (name, slot) in enumerate(self._slots()):
                block = blocks[name]
                if isinstance(block, MoDBlock):
                    x_BLD, aux, cache = block.prefill(
                        x_BLD, context, valid_BL=valid_BL, key=_block_key(key, index, i),
                        routing=routing, slots=cache_slots(slot.capacity, max_length, slack),
                    )  # fmt: skip
                    depth_BL += aux["selected_BL"].astype(jnp.int32)
                else:
                    x_BLD, (k, v) = block.prefill(x_BLD, context)
                    cache = filled(k, v, lengths_B, jnp.zeros_like(lengths_B), max_length)
                caches.append(cache)
            return x_BLD, (caches, depth_BL)

        x_BLD, (caches, depth_GBL) = self._groups(self._embed(tokens_BL), group)
        layers = tuple(
            jax.tree.map(lambda leaf: leaf[g], cache)  # noqa: B023
            for g in range(self.config.num_groups) for cache in caches
        )  # fmt: skip
        x_B1D = jnp.take_along_axis(x_BLD, (lengths_B - 1)[:, None, None], axis=1)
        cache = Cache(layers, lengths_B.astype(jnp.int32))
        return self._logits(x_B1D)[:, 0], cache, jnp.sum(depth_GBL, axis=0)

    def decoder(
        self, *, max_length: int, routing: str, key: jax.Array | None = None
    ) -> Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache, jax.Array]]:
        """A function (tokens_B, active_B, cache) -> (logits_BV, cache, depth_B) for a loop.

        One more token of every row that is active; the others keep their caches. max_length: as
        `prefill` had it. The layers are taken apart here, outside the loop, so that a step reads
        the weights that it uses only.
        Raises InputError for a routing that the model has not learned, or that looks ahead.
        """
        self.config.check_routing(routing, "routing")
        require(routing != "top_k", "routing", routing, "looks at tokens not yet drawn")
        graphdef, layers = self._unstacked()
        slots = self._slots()
        # Looked up: XLA's CPU backend would compute the cosines in every layer.
        rope_1MH = self._context(jnp.arange(max_length)[None], None).rope_BLH

        def step(tokens_B, active_B, cache):
            x_B1D = self._embed(tokens_B[:, None])
            cos_B1H, sin_B1H = (table_1MH[0, cache.positions_B[:, None]] for table_1MH in rope_1MH)
            context = Context((cos_B1H, sin_B1H), None)
            depth_B = jnp.zeros_like(tokens_B)
            caches = []
            for index, layer_cache in enumerate(cache.layers):
                group, i = divmod(index, len(slots))
                block = nnx.merge(graphdef, layers[group])[slots[i][0]]
                if isinstance(block, MoDBlock):
                    x_B1D, layer_cache, routed_B = block.decode(
                        x_B1D, context, positions_B=cache.positions_B, active_B=active_B,
                        cache=layer_cache, key=_block_key(key, group, i), routing=routing,
                    )  # fmt: skip
                    depth_B += routed_B.astype(depth_B.dtype)
                else:
                    x_B1D, layer_cache = block.decode(x_B1D, context, layer_cache, active_B)
                caches.append(layer_cache)
            positions_B = cache.positions_B + active_B.astype(jnp.int32)
            return self._logits(x_B1D)[:, 0], Cache(tuple(caches), positions_B), depth_B

        return step

    def _slots(self) -> list[tuple[str, Slot]]:
        """The pattern's slots, under their names in `blocks`."""
        return [(f"{i}_{slot.kind}", slot) for i, slot in enumerate(self.config.slots)]

    def _ranks(self, index: int) -> bool:
        """Whether the slot's block ranks by the attention of the block before it."""
        slots = self.config.slots
        return index < len(slots) and slots[index].kind == "attention"

    def _context(self, positions_BL, segment_ids_BL) -> Context:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        rope_BLH = rotary_tables(positions_BL, config.head_dim, config.rope_base, dtype)
        return Context(rope_BLH, segment_ids_BL)

    def _embed(self, tokens_BL):
        table_VD = constrain(self.embedding.astype(jnp.dtype(self.config.dtype)), "vocab", None)
        return constrain(table_VD[tokens_BL], "batch", "length", None)

    def _logits(self, x_BLD):
        w_DV = self.embedding.T if self.config.tie_embeddings else self.w_logits[...]
        return product(self.final_norm(x_BLD), w_DV, jnp.float32)

    def _groups(self, x_BLD, group):
        """Runs group(blocks, x_BLD, index) -> (x_BLD, out) over the groups; stacks `out`."""
        loop = self.layer_loop
        scan = loop == "scan" or (loop == "auto" and jax.default_backend() != "cpu")
        scan = scan and isinstance(self.blocks, nnx.Dict)  # not after `unstack`
        graphdef, layers = nnx.split(self.blocks) if scan else self._unstacked()

        def run(x_BLD, params_and_index):
            params, index = params_and_index
            return group(nnx.merge(graphdef, params), x_BLD, index)

        if self.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=dots if self.remat == "dots" else None)
        if scan:
            return jax.lax.scan(run, x_BLD, (layers, jnp.arange(self.config.num_groups)))
        per_group = []
        for index, params in enumerate(layers):
            x_BLD, out = run(x_BLD, (params, index))
            per_group.append(out)
        return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_group)

    def _unstacked(self) -> tuple[Any, list[Any]]:
        """The graph definition of a group's blocks, and the parameters of every group."""
        if isinstance(self.blocks, nnx.List):  # see `unstack`
            groups = [nnx.split(blocks) for blocks in self.blocks]
            return groups[0][0], [params for _, params in groups]
        graphdef, stacked = nnx.split(self.blocks)
        groups = self.config.num_groups
        # lax.split transposes to one concatenation; indexing would pad and add every gradient.
        leaves = [jax.lax.split(leaf, [1] * groups) for leaf in jax.tree.leaves(stacked)]
        structure = jax.tree.structure(stacked)
        return graphdef, [
            jax.tree.unflatten(structure, [part[0] for part in parts])
            for parts in zip(*leaves, strict=True)
        ]


def unstack(model: Any, params: Any) -> tuple[Any, Any]:
    """Graph definition and parameters of the same Transformer with its layers kept apart.

    Decoding reads them so; from stacked layers every call of `generate`, `resume` and `extend`
    copies them first. Computes what the stacked model does, its layers unrolled.
    """
    apart = nnx.merge(model, params)
    graphdef, groups = apart._unstacked()
    apart.blocks = nnx.List([nnx.merge(graphdef, group) for group in groups])
    return nnx.split(apart)


def _block_key(key: jax.Array | None, group: int | jax.Array, index: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, group), index)
