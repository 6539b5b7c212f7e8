"""Mixture-of-Depths: a layer that processes only a share of the positions, around any other.

Legend: B batch, L positions, K selected positions, S residual streams, D model width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import spec
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import unwritten, written
from modjax.nn.call import At, Call, Out
from modjax.nn.routed_layer import Route, RoutedLayer
from modjax.nn.routing import Selection, scatter_add, wide
from modjax.nn.rows import run_rows
from modjax.nn.within import within
from modjax.spec.mod import cache_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoDWrite:
    """The update of a MoDCache after read_B positions of each row, 0 for a row that was not run.

    taken_B, missed_B: more positions that are in it, and that were dropped.
    """

    inner: Any
    route: Route
    read_B: jax.Array
    taken_B: jax.Array
    missed_B: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inner", "route", "taken_B", "missed_B"),
    meta_fields=("slots",),
)
@dataclass(frozen=True)
class MoDCache:
    """The cache of the inner layer, with slots for `slots` positions of each row.

    route: the state of routing. taken_B: positions in the slots. missed_B: positions that were
    dropped, and passed the layer by.
    """

    inner: Any
    route: Route
    taken_B: jax.Array
    missed_B: jax.Array
    slots: int

    @property
    def overflow_B(self) -> jax.Array:
        return self.missed_B

    def written(self, write: MoDWrite, *, fresh: bool = False) -> "MoDCache":
        def after(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(wide(write.read_B > 0, old), new, old)

        router = written(self.route.router, write.route.router, fresh=fresh)
        return MoDCache(
            written(self.inner, write.inner, fresh=fresh),
            Route(router, jax.tree.map(after, self.route.rules, write.route.rules)),
            self.taken_B + write.taken_B,
            self.missed_B + write.missed_B,
            self.slots,
        )


class MoD(RoutedLayer, LayerModule):
    """Routes the k = max(1, round(capacity * n)) best-scored of n valid positions through a layer.

    Eq. 1 of arXiv 2404.02258. The inner layer sees the selected positions only, in order, with
    what belongs to them; what it reports, its losses among it, is passed on.
    """

    def __init__(self, spec: spec.MoD, shape: spec.Shape, *, rngs: nnx.Rngs):
        self.inner = build(spec.inner, shape, rngs=rngs)
        super().__init__(spec, shape, rngs=rngs)

    def __call__(self, x: jax.Array, at: At, call: Call, cache: MoDCache | None = None) -> Out:
        batch, length = x.shape[:2]
        positions_BL = jnp.broadcast_to(at.positions_BL, (batch, length))
        at = at._replace(positions_BL=positions_BL)
        if cache is not None and length == 1 and not call.fresh:
            return self._decode(x, at, call, cache)
        slots = cache_slots(self.config.capacity, length, call.slack)
        bound = slots if cache is None else min(cache.slots, length)
        state = self.start(batch, ()) if cache is None else cache.route
        room_B = None if cache is None or call.fresh else cache.slots - cache.taken_B

        def process(selection: Selection) -> Out:
            inner_cache = None if cache is None else cache.inner
            part, out = within(selection, self.inner, x, at, call, inner_cache)
            update = self.update(selection.scores_BK, part, out.x)
            x_new = scatter_add(x, selection.indices_BK, update)
            return Out(x_new, unwritten(out.write), out.records, {}, out.depth_BL)

        found = self.route(one_stream(x), at, call, state, room_B, bound, process)
        out, records, state = found
        write = out.write
        if cache is not None:
            own: Any = records[""]
            taken_B = jnp.sum(own.selected_BL, axis=1, dtype=jnp.int32)
            missed_B = jnp.sum(own.wanted_BL, axis=1, dtype=jnp.int32) - taken_B
            write = MoDWrite(write, state, at.count(batch, length), taken_B, missed_B)
        return out._replace(write=write, records={**records, **out.records})

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> MoDCache:
        """Returns a cache for at most `length` positions of a row, or slack * capacity of them."""
        slots = cache_slots(self.config.capacity, length, slack)
        route = self.start(batch, self.router.empty(batch, length, slack, dtype))
        inner, none_B = self.inner.empty(batch, slots, slack, dtype), jnp.zeros(batch, jnp.int32)
        return MoDCache(inner, route, none_B, none_B, slots)

    def _decode(self, x: jax.Array, at: At, call: Call, cache: MoDCache) -> Out:
        """Reads one position per row, and computes the inner layer for routed rows only.

        Where no row is routed, the weights of the inner layer are not read. It reports nothing.
        """
        x_BLD = one_stream(x)
        scored, choice = self.score(x_BLD, at, call, cache.route)
        wanted_BL, rules = self.decide(x_BLD, choice, at, call.routing, cache.route.rules)
        routed_BL = wanted_BL & (cache.taken_B < cache.slots)[:, None]
        update, write, depth_BL = self._updates(
            x, at, call, cache.inner, choice.scores_BL, routed_BL
        )
        missed_B = jnp.sum(wanted_BL & ~routed_BL, axis=1, dtype=jnp.int32)
        taken_B = jnp.sum(routed_BL, axis=1, dtype=jnp.int32)
        route, read_B = Route(scored.write, rules), at.count(*x.shape[:2])
        write = MoDWrite(write, route, read_B, taken_B, missed_B)
        return Out(x + update, write, {}, {}, depth_BL)

    def _updates(
        self, x, at: At, call: Call, cache, scores_BL, routed_BL
    ) -> tuple[jax.Array, Any, jax.Array]:
        """Returns what the inner layer adds to the routed rows (0 elsewhere), its write, depth."""

        def run(part):
            x, at, scores_BL, cache = part
            out = self.inner(x, at, call.inside(0), cache)
            update = self.update(scores_BL, x, out.x)
            depth_BL = jnp.where(at.valid_BL, 1 + out.depth_BL, 0)
            update = jnp.where(wide(at.valid_BL, x), update, jnp.zeros_like(x))
            return update, unwritten(out.write), depth_BL

        inputs = (x, at._replace(valid_BL=routed_BL), scores_BL, cache)
        return run_rows(run, inputs, routed_BL[:, 0])


def one_stream(x: jax.Array) -> jax.Array:
    """Returns what a router reads: the mean of several residual streams (B, L, S, D)."""
    return x if x.ndim == 3 else jnp.mean(x, axis=2)
