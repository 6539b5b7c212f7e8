"""A head of one's own: logits by two thin matrices, and a number for each token.

Legend: B batch, L positions, D width, R rank, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

import modjax
from modjax.nn import make_param, normal_param
from modjax.specs import Cost, Head, Load, Shape


@dataclasses.dataclass(frozen=True)
class Factored(Head):
    rank: int = 4

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        numbers = self.rank * (shape.width + shape.vocab_size)
        yield Cost("logits", 2.0 * load.tokens * numbers, numbers, role="embedding")
        yield Cost("bias", load.tokens * shape.vocab_size, shape.vocab_size, role="embedding")


class FactoredModule(nnx.Module):
    def __init__(self, spec: Factored, shape: Shape, *, rngs):
        sizes = (
            ((shape.width, spec.rank), ("embed", None)),
            (
                (spec.rank, shape.vocab_size),
                (None, "vocab"),
            ),
        )
        self.w_in, self.w_out = (
            normal_param(rngs, size, axes, std=1 / math.sqrt(size[0]), role="embedding")
            for size, axes in sizes
        )
        self.bias = make_param(jnp.zeros(shape.vocab_size), ("vocab",), role="embedding")

    def __call__(self, x_BLD, embed):
        x_BLR = x_BLD @ self.w_in.astype(x_BLD.dtype)
        logits_BLV = x_BLR @ self.w_out.astype(x_BLD.dtype)
        return logits_BLV.astype(jnp.float32) + self.bias[...][None, None]


modjax.register(Factored, FactoredModule)
