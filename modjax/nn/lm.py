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
from modjax.kernels import constrain_stream
from modjax.nn.build import build
from modjax.nn.cache import overflow
from modjax.nn.call import At, Call, number_rows
from modjax.nn.layers.attention import rotary_tables
from modjax.nn.layers.dense import RMSNorm
from modjax.nn.layers.ends import Head
from modjax.nn.records import Record
from modjax.nn.routing.selection import gather
from modjax.nn.stack import Stack, empty_caches, read_layers


class Cache(NamedTuple):
    """The state of decoding: the caches of all layers, and each row's next position."""

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
        self.final_norm = RMSNorm(shape.width, shape)
        self.unembed = build(config.head, shape, rngs=rngs)

    def __call__(self, *args: Any, **options: Any) -> tuple[jax.Array, dict[str, Record]]:
        """Returns the logits (B, L, V) in float32, and the records. Arguments: see `features`."""
        x_BLD, records = self.features(*args, **options)
        return self.head(x_BLD), records

    @property
    def head(self) -> Head:
        """The function from features (B, L, D) to logits (B, L, V), as a pytree of weights."""
        return Head(self.unembed, self.embed if self.config.head.tied else None)

    def features(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        *,
        prompt_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        routing: str = "trained",
        slack: float | None = None,
        layer_loop: str = "auto",
        remat: str = "none",
    ) -> tuple[jax.Array, dict[str, Record]]:
        """Returns the features that the head reads, (B, L, D), and the stacked records.

        segment_ids_BL: attention stays within equal ids; 0 is padding, which is never routed.
        prompt_BL: True marks the prompt, see specs.Prompt.
        key: PRNG key, needed by random routing only.
        routing, slack: see modjax.nn.Call.
        layer_loop, remat: how the layers are run, see specs.Execution. They change no number except
          by rounding.

        Raises InputError for a routing that the model does not have.
        """
        self.config.check_routing(routing, "routing")
        valid_BL = None if segment_ids_BL is None else segment_ids_BL > 0
        positions_1L = jnp.arange(tokens_BL.shape[1])[None]
        sequences_BL = number_rows(*tokens_BL.shape)
        ropes = self._ropes(positions_1L, tokens_BL.shape[1])
        at = At(positions_1L, segment_ids_BL, valid_BL, ropes, {}, sequences_BL, prompt_BL)
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

        Row b reads its first lengths_B[b] >= 0 tokens, which follow those in its cache. A cache of
        None is empty. logits_BV are those after the row's last token. depths_BL counts the
        selections that took each position. One call with L = 1 decodes one token.

        Call `reader` outside any loop: it unstacks the layers.

        max_length: bound on the tokens that a row reads, summed over all calls.
        routing, slack: see modjax.nn.Call. A routed layer's cache has slots for slack * capacity *
          max_length positions of a row. "trained" looks ahead, so it cannot extend a cache.

        Raises InputError for a routing that the model does not have, or that cannot use a cache.
        """
        self._check_reading(routing, slack)
        layers = self.stack.repetitions()
        # Looked up: XLA's CPU backend would compute the cosines in every layer.
        tables = self._ropes(jnp.arange(max_length)[None], max_length)
        dtype = jnp.dtype(self.config.dtype)

        def read(tokens_BL, lengths_B, cache):
            batch, length = tokens_BL.shape
            call = Call(routing, slack, key, fresh=cache is None)
            positions_BL = offsets_1L = jnp.arange(length)[None]
            if cache is None:
                caches = empty_caches(layers, batch, max_length, slack, dtype)
                cache = Cache(caches, jnp.zeros(batch, jnp.int32))
            else:
                accepted = "must be another: training looks at tokens not yet drawn"
                require(routing != "trained", "routing", routing, accepted)
                positions_BL = cache.positions_B[:, None] + offsets_1L
            ropes = jax.tree.map(lambda t: t[0].at[positions_BL].get(mode="clip"), tables)
            valid_BL = offsets_1L < lengths_B[:, None]
            at = At(positions_BL, None, valid_BL, ropes, {}, number_rows(batch, length))
            x = self._open(tokens_BL)
            x, caches, depths_BL = read_layers(layers, x, at, call, cache.layers)
            last_B1 = jnp.maximum(lengths_B - 1, 0)[:, None]
            logits_B1V = self.head(self._close(x if length == 1 else gather(x, last_B1)))
            positions_B = cache.positions_B + lengths_B.astype(jnp.int32)
            return logits_B1V[:, 0], Cache(caches, positions_B), depths_BL

        return read

    def _check_reading(self, routing: str, slack: float | None) -> None:
        self.config.check_routing(routing, "routing")
        if routing == "trained":
            needs = {name for layer, _ in self.config.repeated() for name in layer.passes_on()}
            passed = f"ranks by {', '.join(needs)}, which later positions decide: "
            require(not needs, "routing", routing, passed + "reading needs another routing")
            accepted = "must be 1 or more, or None, to read with routing = 'trained'"
            require(slack is None or slack >= 1, "slack", slack, accepted)

    def _ropes(
        self, positions_BL: jax.Array, length: int
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Returns the rotary tables, cos and sin, that the layers read, by the text of a Rope."""
        dtype, head_dim = jnp.dtype(self.config.dtype), self.config.shape.head_dim
        ropes = {rope for layer, _ in self.config.repeated() for rope in layer.ropes()}
        return {
            str(rope): rotary_tables(positions_BL, rope, head_dim, length, dtype)
            for rope in sorted(ropes, key=str)
        }

    def _open(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns the residual stream, or streams, before the first layer."""
        x_BLD = self.embed(tokens_BL, jnp.dtype(self.config.dtype))
        return constrain_stream(x_BLD if self.streams is None else self.streams.open(x_BLD))

    def _close(self, x: jax.Array) -> jax.Array:
        """Returns the features, from the residual stream after the last layer."""
        return self.final_norm(x if self.streams is None else self.streams.close(x))


def unstack(model: Any, params: Any) -> tuple[Any, Any]:
    """Returns the graph definition and parameters of a Transformer with its layers unstacked.

    Unstack once before decoding: `generate`, `resume` and `extend` copy stacked layers in every
    call. The outputs stay the same.
    """
    merged = nnx.merge(model, params)
    merged.stack.unstack()
    return nnx.split(merged)
