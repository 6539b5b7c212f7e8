"""Mixture-of-Depths: a layer that passes only a share of the positions through another.

Legend: B batch, L positions, K selected positions, S residual streams, D model width.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import LayerCache, where_read, written
from modjax.nn.call import At, Call, Out
from modjax.nn.routing.routed_layer import RoutedLayer
from modjax.nn.routing.within import update_rows, update_selected
from modjax.specs.layers.mod import cache_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoDCache(LayerCache):
    """Cache of a routed layer. Its update has the same fields, for the new positions.

    In the update, a row that did not run has a read_B of 0; its other entries are arbitrary.

    inner: the cache of the inner layer, with slots for `slots` positions of each row.
    state: the state of the router and the rules, see `RoutedLayer.start`.
    read_B, taken_B, overflow_B: numbers of positions that were read, processed and dropped.
    """

    inner: Any
    state: dict[str, Any]
    read_B: jax.Array
    taken_B: jax.Array
    overflow_B: jax.Array
    slots: int = field(metadata={"static": True})

    def overflow(self) -> jax.Array:
        return self.overflow_B

    def written(self, write: "MoDCache", *, fresh: bool = False) -> "MoDCache":
        new, old = ({**part.state, "router": ()} for part in (write, self))
        router = written(self.state["router"], write.state["router"], fresh=fresh)
        return MoDCache(
            written(self.inner, write.inner, fresh=fresh),
            {**where_read(write.read_B, new, old), "router": router},
            self.read_B + write.read_B,
            self.taken_B + write.taken_B,
            self.overflow_B + write.overflow_B,
            self.slots,
        )


class MoD(RoutedLayer, LayerModule):
    """Layer that routes k = max(1, round(capacity * n)) of n valid positions through `inner`.

    See arXiv 2404.02258, Eq. 1. The inner layer sees only the selected positions, in order, with
    their context. Its records and losses are reported too.
    """

    def __init__(self, spec: specs.MoD, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.inner = build(spec.inner, shape, rngs=rngs)
        super().__init__(spec, shape, rngs=rngs)

    def __call__(self, x: jax.Array, at: At, call: Call, cache: MoDCache | None = None) -> Out:
        batch, length = x.shape[:2]
        at = at._replace(positions_BL=jnp.broadcast_to(at.positions_BL, (batch, length)))
        if cache is None:
            bound = limit = cache_slots(self.config.capacity, length, call.slack)
            state, inner_cache = self.start(batch), None
        else:
            bound, limit = min(cache.slots, length), cache.slots - cache.taken_B[:, None]
            state, inner_cache = cache.state, cache.inner
        x_BLD = x if x.ndim == 3 else jnp.mean(x, axis=2)  # routers read the mean of the streams
        selection, records, state = self.route(x_BLD, at, call, state, limit)
        own: Any = records[""]
        inside = self.update, self.inner, x, at, call, inner_cache
        if cache is None or call.fresh or length > 1:
            out = self.run(lambda s: update_selected(s, *inside), selection, own, bound)
            out = out._replace(records={**records, **out.records})
        else:
            out = update_rows(own.selected_BL, own.scores_BL, *inside)
        if cache is None:
            return out
        masks = own.selected_BL, own.requested_BL
        taken_B, requested_B = (jnp.sum(mask_BL, axis=1, dtype=jnp.int32) for mask_BL in masks)
        counts = at.count(batch, length), taken_B, requested_B - taken_B
        return out._replace(write=MoDCache(out.write, state, *counts, cache.slots))

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> MoDCache:
        """Returns an empty cache with slack * capacity * length slots a row; slack None: length."""
        slots = cache_slots(self.config.capacity, length, slack)
        state = self.start(batch, self.router.empty(batch, length, slack, dtype))
        inner, none_B = self.inner.empty(batch, slots, slack, dtype), jnp.zeros(batch, jnp.int32)
        return MoDCache(inner, state, none_B, none_B, none_B, slots)
