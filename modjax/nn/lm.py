"""A decoder: a stack of layers between an embedding and a head.

Legend: B batch, L positions, D model width, H head width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import specs
from modjax.errors import require
from modjax.nn.build import build
from modjax.nn.cache import overflow
from modjax.nn.call import At, Call, number_rows
from modjax.nn.layers.attention import rotary_tables
from modjax.nn.layers.dense import RMSNorm
from modjax.nn.layers.ends import Head
from modjax.nn.records import Record
from modjax.nn.routing.selection import gather
from modjax.nn.sharding import constrain_stream
from modjax.nn.stack import Stack


class Cache(NamedTuple):
    """The state of decoding: a cache of every layer, and the position of each row's next token."""

    layers: tuple[Any, ...]
    positions_B: jax.Array

    @property
    def overflow_B(self) -> jax.Array:
        """Positions of each row that were dropped, summed over the layers."""
        return sum(map(overflow, self.layers), jnp.zeros_like(self.positions_B))


Reader = Callable[[jax.Array, jax.Array, Cache | None], tuple[jax.Array, Cache, jax.Array]]


class Transformer(nnx.Module):
    """A decoder: features from tokens, and logits from features."""

    def __init__(self, config: specs.ModelSpec, *, rngs: nnx.Rngs):
        self.config = config
        streams, shape = config.streams, config.shape
        self.embed = build(config.embed, shape, rngs=rngs)
        self.streams = None if streams is None else build(streams, shape, rngs=rngs)
        self.stack = Stack(config, rngs=rngs)
        self.final_norm = RMSNorm(shape.width, eps=config.norm_eps)
        self.unembed = build(config.head, shape, rngs=rngs)

    def __call__(self, *args: Any, **options: Any) -> tuple[jax.Array, dict[str, Record]]:
        """Returns logits (B, L, V) in float32, and the records. The arguments are those of
        `features`.
        """
        x_BLD, records = self.features(*args, **options)
        return self.head(x_BLD), records

    @property
    def head(self) -> Head:
        """A function from features (B, L, D) to logits (B, L, V) that is also a tree of weights."""
        return Head(self.unembed, self.embed if self.config.head.tied else None)

    def features(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        routing: str = "trained",
        slack: float | None = None,
        layer_loop: str = "auto",
        remat: str = "none",
    ) -> tuple[jax.Array, dict[str, Record]]:
        """Returns what the head reads, (B, L, D), and the records, stacked over repetitions.

        segment_ids_BL: attention stays within equal ids, 0 is padding (never routed).
        key: PRNG key, needed by random routing only.
        routing: "trained" as in training; "causal", by which each layer uses its own rule that
          never looks ahead; or the name of a rule, which those layers use that have it.
        slack: without the future, a routed layer takes the first slack * capacity * L positions of
          a row at most, as a cache has slots for; None, all that ask.
        layer_loop, remat: how the layers are run, see specs.Execution; it changes no number but by
          rounding.
        Raises InputError for a routing that the model does not have.
        """
        self.config.check_routing(routing, "routing")
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        positions_1L = jnp.arange(tokens_BL.shape[1])[None]
        sequences_BL = number_rows(*tokens_BL.shape)
        ropes = self._ropes(positions_1L)
        at = At(positions_1L, segment_ids_BL, valid_BL, ropes, {}, sequences_BL)
        call = Call(routing, slack, key, layer_loop=layer_loop, remat=remat)
        x, records = self.stack(self._open(tokens_BL), at, call)
        return self._close(x), records

    def reader(
        self,
        *,
        max_length: int,
        routing: str,
        slack: float | None = None,
        key: jax.Array | None = None,
    ) -> Reader:
        """Returns a function (tokens_BL, lengths_B, cache) -> (logits_BV, cache, depths_BL).

        Row b reads its first lengths_B[b] >= 0 tokens, after those in its cache, which is None for
        none yet. logits_BV: after the last of them. depths_BL: how many selections took each
        position. One call with L = 1 decodes.

        max_length: of all that a row reads. routing, slack: see the call; under "trained", which
        looks ahead, a continuation is no honest sample, and only a first text can be read. A routed
        layer's cache has room for slack * capacity * max_length positions of a row.
        The layers are taken apart here, outside any loop.
        Raises InputError for a routing that the model does not have.
        """
        self.config.check_routing(routing, "routing")
        if routing == "trained":
            needs = {name for layer, _ in self.config.repeated() for name in layer.hands_on()}
            require(
                not needs,
                "routing",
                routing,
                f"ranks by {', '.join(needs)}, which later "
                "positions decide: reading needs another routing",
            )
            require(slack is None or slack >= 1, "slack", slack, "must be 1 or more as trained")
        apart = self.stack.apart()
        # Looked up: XLA's CPU backend would compute the cosines in every layer.
        tables = self._ropes(jnp.arange(max_length)[None])
        dtype = jnp.dtype(self.config.dtype)

        def read(tokens_BL, lengths_B, cache):
            batch, length = tokens_BL.shape
            fresh = cache is None
            offsets_1L = jnp.arange(length)[None]
            if cache is None:
                empty = self.stack.empty(apart, batch, max_length, slack, dtype)
                cache = Cache(empty, jnp.zeros(batch, jnp.int32))
                positions_BL = offsets_1L
            else:
                require(routing != "trained", "routing", routing, "looks at tokens not yet drawn")
                positions_BL = cache.positions_B[:, None] + offsets_1L
            ropes = jax.tree.map(lambda t: t[0].at[positions_BL].get(mode="clip"), tables)
            valid_BL = offsets_1L < lengths_B[:, None]
            sequences_BL = number_rows(batch, length)
            at = At(positions_BL, None, valid_BL, ropes, {}, sequences_BL)
            call = Call(routing, slack, key, fresh)
            x, caches, depths_BL = self.stack.read(
                apart, self._open(tokens_BL), at, call, cache.layers
            )
            last_B1 = jnp.maximum(lengths_B - 1, 0)[:, None]
            logits_B1V = self.head(self._close(x if length == 1 else gather(x, last_B1)))
            positions_B = cache.positions_B + lengths_B.astype(jnp.int32)
            return logits_B1V[:, 0], Cache(caches, positions_B), depths_BL

        return read

    def _ropes(self, positions_BL: jax.Array) -> dict[float, tuple[jax.Array, jax.Array]]:
        """Returns the rotary tables that the layers read, by their bases."""
        dtype, width = jnp.dtype(self.config.dtype), self.config.shape.head_dim
        bases = {rope for layer, _ in self.config.repeated() for rope in layer.ropes()}
        return {base: rotary_tables(positions_BL, width, base, dtype) for base in sorted(bases)}

    def _open(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns the residual stream, or streams, before the first layer."""
        x_BLD = self.embed(tokens_BL, jnp.dtype(self.config.dtype))
        return constrain_stream(x_BLD if self.streams is None else self.streams.open(x_BLD))

    def _close(self, x: jax.Array) -> jax.Array:
        """Returns the features, from the residual stream after the last layer."""
        return self.final_norm(x if self.streams is None else self.streams.close(x))


def unstack(model: Any, params: Any) -> tuple[Any, Any]:
    """Returns graph definition and parameters of the same Transformer with unstacked layers.

    Decoding reads unstacked layers: every call of `generate`, `resume` and `extend` copies stacked
    ones first. The model computes the same.
    """
    apart = nnx.merge(model, params)
    apart.stack.unstack()
    return nnx.split(apart)
