"""The embedding and the head of a model, and chunked computation of functions of its features.

An embedding is called as embed(tokens_BL, dtype) -> x_BLD. A head is called as
unembed(x_BLD, embed) -> logits (B, L, V) in float32, where `embed` is the embedding for a tied head
and None for others. `Transformer.head` joins the two.

Legend: B batch, L positions, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import NORMALISER, product
from modjax.nn.params import normal_param, read
from modjax.sharding import batch_shards, constrain, per_device

# The most float32 numbers of logits that a device has at once: half a gigabyte.
MOST_NUMBERS = 2**27


class Tokens(nnx.Module):
    """A table with a row for each token."""

    def __init__(self, spec: specs.Tokens, shape: specs.Shape, *, rngs: nnx.Rngs):
        d = shape.width
        self.scale = math.sqrt(d) if spec.scale else None
        # A tied table is also the head, whose logits should start near 1.
        std = 1 / math.sqrt(d) if shape.tied or spec.scale else 1.0
        size, axes = (shape.vocab_size, d), ("vocab", "embed")
        self.table = normal_param(rngs, size, axes, std=std, role="embedding")

    @jax.named_scope("embedding")
    def __call__(self, tokens_BL: jax.Array, dtype: DTypeLike) -> jax.Array:
        x_BLD = constrain(read(self.table, dtype), "vocab", None)[tokens_BL]
        return x_BLD if self.scale is None else x_BLD * jnp.asarray(self.scale, dtype)


class Logits(nnx.Module):
    """A head with weights of its own (specs.Logits), or those of the embedding (specs.Tied)."""

    def __init__(self, spec: specs.Logits, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.softcap = spec.softcap
        size, axes = (shape.width, shape.vocab_size), ("embed", "vocab")
        if not spec.tied:
            std = 1 / math.sqrt(shape.width)
            self.w_logits = normal_param(rngs, size, axes, std=std, role="embedding")

    @jax.named_scope("logits")
    def __call__(self, x_BLD: jax.Array, embed: Any) -> jax.Array:
        dtype = x_BLD.dtype
        w_DV = read(self.w_logits, dtype) if embed is None else read(embed.table, dtype).T
        z_BLV, cap = product(x_BLD, w_DV, jnp.float32), self.softcap
        return z_BLV if cap is None else cap * jnp.tanh(z_BLV / cap)


class Head(NamedTuple):
    """A model's head as a tree of weights: head(x_BLD) returns the logits (B, L, V)."""

    unembed: Any
    embed: Any

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.unembed(x_BLD, self.embed)


def in_chunks(
    function: Callable[..., jax.Array], weights: Any, *arrays: jax.Array, numbers: int
) -> jax.Array:
    """Returns function(weights, *arrays), (B, L), computed on one chunk of positions at a time.

    The backward pass recomputes each chunk. If all positions make at most MOST_NUMBERS numbers on a
    device, the function is called directly.

    function: maps arrays (B, L, ...) to (B, L), position by position.
    weights: a tree of all other arrays that `function` reads, such as a Head.
    numbers: how many float32 numbers `function` makes for one position, such as V.
    """
    batch, length = arrays[0].shape[:2]
    chunks = -(-(batch // batch_shards(batch)) * length * numbers // MOST_NUMBERS)
    if chunks <= 1:
        return function(weights, *arrays)
    size = -(-length // min(chunks, length))
    chunks = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, chunks * size - length)
        x = jnp.pad(x, padding).reshape(x.shape[0], chunks, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def on_device(weights: Any, *arrays: jax.Array) -> jax.Array:
        policy = jax.checkpoint_policies.save_only_these_names(NORMALISER)
        one = jax.checkpoint(
            lambda chunk: function(weights, *chunk), policy=policy, prevent_cse=False
        )
        found = jnp.moveaxis(jax.lax.map(one, tuple(map(split, arrays))), 0, 1)
        return found.reshape(found.shape[0], -1)[:, :length]

    return per_device(on_device, weights, *arrays)
