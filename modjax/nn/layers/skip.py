"""Skip: a layer that runs where its router asks for it (MindSkip, arXiv 2410.13184).

Legend: B batch, L positions, K selected positions, D model width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.nn.build import LayerModule, build
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers.attention import side
from modjax.nn.layers.dense import Sublayer, names, unit_rms
from modjax.nn.layers.mod import MoDCache
from modjax.nn.routing.routed_layer import in_buckets
from modjax.nn.routing.selection import Selection, wide
from modjax.nn.routing.skipping import Skipped
from modjax.nn.routing.within import update_rows, update_selected
from modjax.specs.layers.mod import selected_tokens


class Skip(LayerModule):
    """Layer that runs `inner` at some positions, and leaves the others as they are."""

    def __init__(self, spec: specs.Skip, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.spec, self.norm_eps = spec, shape.norm_eps
        # The name of the first sublayer in `inner`; None if it is `inner` itself.
        inner = spec.inner
        self.name = next(iter(names(inner.parts))) if isinstance(inner, specs.Seq) else None
        self.inner = build(spec.inner, shape, rngs=rngs)
        single = shape._replace(streams=1)
        self.router: Any = build(spec.router, single, rngs=rngs, outputs=1)
        self.rule: Any = build(spec.rule, single, rngs=rngs, capacity=spec.capacity)

    def __call__(self, x: jax.Array, at: At, call: Call, cache: MoDCache | None = None) -> Out:
        batch, length = x.shape[:2]
        state = self._start(batch) if cache is None else cache.state
        scores_BL, records, state = self._score(x, at, call, state, cached=cache is not None)
        bound, pool = self.rule.bound(), self.spec.pool
        # No threshold decides about these positions.
        always_BL = at.positions_BL < (pool.size if isinstance(pool, specs.First) else 0)
        wanted_BL = (scores_BL >= bound) | always_BL
        if call.routing == "all":
            wanted_BL = jnp.ones_like(wanted_BL)
        valid_BL = jnp.ones_like(wanted_BL) if at.valid_BL is None else at.valid_BL
        wanted_BL &= valid_BL
        whole = cache is None and call.routing in ("trained", "all")
        slots = self.spec.slots(length, call.slack) if cache is None else cache.slots
        free = slots if cache is None else slots - cache.taken_B[:, None]
        selected_BL = wanted_BL if whole else wanted_BL & (jnp.cumsum(wanted_BL, axis=1) <= free)
        odds_BL = jax.nn.sigmoid(scores_BL - bound)
        through_BL = odds_BL - jax.lax.stop_gradient(odds_BL)  # 0, with the gradient of the odds
        gates_BL = wanted_BL.astype(jnp.float32) + through_BL
        scores_BL = jnp.where(always_BL, jnp.inf, scores_BL)
        records[""] = Skipped(scores_BL, wanted_BL, selected_BL)
        records["rule"] = self.rule.report(scores_BL, gates_BL, valid_BL)
        inner, write = self._look(x, at, call, None if cache is None else cache.inner)
        if whole:
            out = self._masked(x, at, call, inner, wanted_BL, through_BL)
        elif length == 1 or isinstance(pool, specs.Prompt):
            out = update_rows(selected_BL, scores_BL, _change, self.inner, x, at, call, inner)
        else:
            out = self._gathered(x, at, call, inner, selected_BL, min(slots, length))
        out = out._replace(records={**records, **out.records})
        if cache is None:
            return out._replace(write=())
        masks = valid_BL, selected_BL, wanted_BL & ~selected_BL
        counts = (jnp.sum(mask_BL, axis=1, dtype=jnp.int32) for mask_BL in masks)
        write = self._with_keys(out.write, write)
        return out._replace(write=MoDCache(write, state, *counts, slots=cache.slots))

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> MoDCache:
        """Returns an empty cache. With keys="all", attention has slots for all positions."""
        slots = self.spec.slots(length, slack)
        inner = self.inner.empty(batch, slots, slack, dtype)
        if self.spec.sees_all:
            inner = self._with_keys(inner, self._first.empty(batch, length, slack, dtype))
        state = self._start(batch, self.router.empty(batch, length, slack, dtype))
        none_B = jnp.zeros(batch, jnp.int32)
        return MoDCache(inner, state, none_B, none_B, none_B, slots)

    @property
    def _first(self) -> Any:
        """The first sublayer of `inner`."""
        return self.inner if self.name is None else self.inner.parts[self.name]

    def _start(self, batch: int, router: Any = ()) -> dict[str, Any]:
        """Returns the state before the first position: the router's, and pooled sum and number."""
        zeros_B = jnp.zeros(batch, jnp.float32)
        return {"router": router, "pooled": (zeros_B, zeros_B)}

    def _score(
        self, x: jax.Array, at: At, call: Call, state: dict[str, Any], *, cached: bool
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
        """Returns scores (B, L), pooled if sequences decide, the records, and the state."""
        x_BLD = x if x.ndim == 3 else jnp.mean(x, axis=2)  # routers read the mean of the streams
        sublayer = isinstance(self._first, Sublayer)
        h_BLD = self._first.before(x_BLD) if sublayer else unit_rms(x_BLD, self.norm_eps)
        scored = self.router(h_BLD, at, call, state["router"] or None)
        scores_BL, records = scored.x[..., 0], under("router", scored.records)
        state = {**state, "router": scored.write}
        if self.spec.pool is None:
            return scores_BL, records, state
        counted_BL = self._counted(at, call, cached=cached)
        summed = (jnp.where(counted_BL, scores_BL, 0.0), counted_BL.astype(jnp.float32))
        sums_BL, numbers_BL = (
            before_B[:, None] + jnp.cumsum(new_BL, axis=1)
            for before_B, new_BL in zip(state["pooled"], summed, strict=True)
        )
        state["pooled"] = sums_BL[:, -1], numbers_BL[:, -1]
        means_BL = sums_BL / jnp.maximum(numbers_BL, 1)
        if isinstance(self.spec.pool, specs.Prompt):
            means_BL = jnp.broadcast_to(means_BL[:, -1:], means_BL.shape)
        return means_BL, records, state

    def _counted(self, at: At, call: Call, *, cached: bool) -> jax.Array:
        """Returns the positions whose scores are pooled, (B, L) bool."""
        match self.spec.pool:
            case specs.First(size):
                counted_BL = at.positions_BL < size
            case specs.Prompt() if at.prompt_BL is not None:
                counted_BL = at.prompt_BL
            case specs.Prompt() if cached:
                counted_BL = jnp.full(at.positions_BL.shape, call.fresh)
            case specs.Prompt() if call.routing != "trained":
                counted_BL = at.positions_BL == 0
            case _:
                counted_BL = jnp.ones(at.positions_BL.shape, bool)
        return counted_BL if at.valid_BL is None else counted_BL & at.valid_BL

    def _look(self, x: jax.Array, at: At, call: Call, cache: Any) -> tuple[Any, Any]:
        """Returns the cache to run `inner` with, and the update of its attention's cache.

        An attention that sees the keys of all positions gets them in a `Seen`.
        """
        if not self.spec.sees_all:
            return cache, ()
        own = cache
        if self.name is not None:
            cache = dict.fromkeys(self.inner.parts) if cache is None else cache
            own = cache[self.name]
        seen, write = self._first.look(self._first.before(x), at, call, own)
        return self._with_keys(cache, seen), write

    def _with_keys(self, tree: Any, keys: Any) -> Any:
        """Returns a cache of `inner`, or its update, with the part of its first attention."""
        if not self.spec.sees_all:
            return tree
        return keys if self.name is None else {**tree, self.name: keys}

    def _masked(
        self, x: jax.Array, at: At, call: Call, cache: Any, wanted_BL: jax.Array, through_BL: Any
    ) -> Out:
        """Runs `inner` at all positions, and keeps the result where it is wanted."""
        shown_BL = at.valid_BL if self.spec.sees_all else wanted_BL
        at, call = at._replace(valid_BL=shown_BL), call.inside(0)
        call = call if self.spec.sees_all else call._replace(layout="masked")
        out = self.inner(x, at, call, cache)
        x_new = jnp.where(wide(wanted_BL, x), out.x, x)
        x_new += wide(through_BL.astype(x.dtype), x) * (out.x - x)
        depth_BL = jnp.where(wanted_BL, 1 + out.depth_BL, 0)
        return Out(x_new, (), under("inner", out.records), {}, depth_BL)

    def _gathered(
        self, x: jax.Array, at: At, call: Call, cache: Any, selected_BL: jax.Array, bound: int
    ) -> Out:
        """Runs `inner` at the selected positions only."""

        def process(selection: Selection) -> Out:
            seen_by = cache
            if self.spec.sees_all:
                seen = cache if self.name is None else cache[self.name]
                if seen.side is None:  # the keys of the row itself
                    places_BK = jnp.where(selection.valid_BK, selection.indices_BK, 0)
                    seen = seen._replace(side=side(at), places_BL=places_BK)
                seen_by = self._with_keys(cache, seen)
            return update_selected(selection, _change, self.inner, x, at, call, seen_by)

        k = selected_tokens(self.spec.capacity, x.shape[1])
        sizes = 0.6 * k, 1.1 * k, 1.5 * k  # the capacity moves between layers
        return in_buckets(process, selected_BL, selected_BL.astype(jnp.float32), sizes, bound)


def _change(scores_BK: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the update of a layer: skipped or not, it is not weighted by the scores."""
    return y - x
