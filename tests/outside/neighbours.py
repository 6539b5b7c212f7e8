"""A router of one's own with context: a causal convolution over the last positions.

Legend: B batch, L positions, W width of the window, D model width, R scores of a position.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import modjax
from modjax.nn import LayerCache, LayerModule, Out, normal_param
from modjax.specs import Cost, Load, Shape


@dataclasses.dataclass(frozen=True)
class Neighbours(modjax.Router):
    """Scores of a position from itself and the width - 1 positions before it."""

    width: int = 3

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Iterator[Cost]:
        numbers = self.width * shape.d_model * outputs
        yield Cost("router", 2.0 * load.tokens * numbers, numbers, role="router")

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return (self.width - 1) * shape.d_model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Before(LayerCache):
    """Cache of the last width - 1 positions of each row, zeros before the first.

    As an update: the same after read_B more positions. A row that is not run has read none, and the
    rest of its update may be anything.
    """

    x_BWD: jax.Array
    read_B: jax.Array

    def written(self, write: "Before", *, fresh: bool = False) -> "Before":
        read_B11 = (write.read_B > 0)[:, None, None]
        return Before(jnp.where(read_B11, write.x_BWD, self.x_BWD), write.read_B)


class NeighboursModule(LayerModule):
    def __init__(self, spec: Neighbours, shape: Shape, *, outputs: int, rngs):
        self.width, self.d_model = spec.width, shape.d_model
        std = (spec.width * shape.d_model) ** -0.5
        axes = (None, "replicated", None)
        self.w = normal_param(
            rngs, (spec.width, shape.d_model, outputs), axes, std=std, role="router"
        )

    def __call__(self, x_BLD, at, call, cache=None) -> Out:
        batch, length, width = x_BLD.shape
        x_BLD = x_BLD.astype(jnp.float32)
        before_BWD = jnp.zeros((batch, self.width - 1, width)) if cache is None else cache.x_BWD
        wide_BLD = jnp.concatenate([before_BWD, x_BLD], axis=1)
        scores_BLR = sum(
            jnp.einsum("BLD,DR->BLR", wide_BLD[:, w : w + length], self.w[...][w])
            for w in range(self.width)
        )
        read_B = at.count(batch, length)  # padding comes last
        places_BW = read_B[:, None] + jnp.arange(self.width - 1)[None]
        kept_BWD = jax.vmap(lambda x_LD, places_W: x_LD[places_W])(wide_BLD, places_BW)
        return Out(scores_BLR, () if cache is None else Before(kept_BWD, read_B))

    def empty(self, batch, length, slack, dtype):
        before_BWD = jnp.zeros((batch, self.width - 1, self.d_model))
        return Before(before_BWD, jnp.zeros(batch, jnp.int32))


modjax.register(Neighbours, NeighboursModule)
