"""Layer from outside: only every `stride`-th position passes through the inner layer.

Legend: B batch, L positions, K selected positions, D model width.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import modjax
from modjax.nn import At, Call, LayerModule, Out, Record, build, make_param, within
from modjax.nn.routing.selection import scatter_add, select_first_k
from modjax.specs import Cost, Load, Shape


@dataclasses.dataclass(frozen=True)
class Strided(modjax.Layer):
    inner: modjax.Layer
    stride: int = 4

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        k = -(-load.tokens // self.stride)
        for cost in self.inner.cost(shape, Load(k, k)):
            yield cost._replace(active=cost.active / self.stride)
        yield Cost("gain", params=shape.d_model)

    def routed(self) -> int:
        return 1 + super().routed()

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return self.inner.cache_numbers(shape, -(-length // self.stride), slack)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strode(Record):
    """used_BL: the positions that were processed. size_B: the mean square of their updates."""

    used_BL: jax.Array
    size_B: jax.Array

    def loss(self, tokens=None, totals=None):
        return 0.01 * jnp.mean(self.size_B)  # a small update is cheap to learn from

    @classmethod
    def statistics(cls, records, valid_BL):
        sizes = jnp.stack([jnp.mean(record.size_B) for record in records.values()])
        return {"strided/update": jnp.mean(sizes)}


class StridedModule(LayerModule):
    def __init__(self, spec: Strided, shape: Shape, *, rngs):
        self.spec = spec
        self.inner = build(spec.inner, shape, rngs=rngs)
        self.gain = make_param(jnp.ones(shape.d_model), ("replicated",))

    def __call__(self, x_BLD, at: At, call: Call, cache=None) -> Out:
        batch, length = x_BLD.shape[:2]
        stride = self.spec.stride
        used_BL = jnp.broadcast_to(at.positions_BL % stride == stride - 1, (batch, length))
        used_BL = used_BL if at.valid_BL is None else used_BL & at.valid_BL
        picked = select_first_k(used_BL, jnp.zeros((batch, length)), -(-length // stride))
        part_BKD, out = within(picked, self.inner, x_BLD, at, call, cache)
        update_BKD = (out.x - part_BKD) * self.gain[...][None, None].astype(x_BLD.dtype)
        own = Strode(used_BL, jnp.mean(jnp.square(update_BKD.astype(jnp.float32)), axis=(1, 2)))
        x_BLD = scatter_add(x_BLD, picked.indices_BK, update_BKD)
        return out._replace(x=x_BLD, records={"": own, **out.records})

    def empty(self, batch, length, slack, dtype):
        return self.inner.empty(batch, -(-length // self.spec.stride), slack, dtype)


modjax.register(Strided, StridedModule)
