"""Mixture-of-Depths: a wrapper that lets any layer process only a share of the positions.

Legend: B batch, L positions, K selected positions, D model width; P shards of the batch with R rows
each, S of them routed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import spec
from modjax.nn.build import build
from modjax.nn.cache import padded, written
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers import empty
from modjax.nn.params import measured
from modjax.nn.records import Inside, Record
from modjax.nn.routed import Routed
from modjax.nn.routers import ROUTERS, Predictor, Ranking, masked_mean
from modjax.nn.routing import (
    Selection,
    check_inputs,
    gather,
    gather_pairs,
    paced,
    scatter_add,
    select_first_k,
    select_top_k,
    selected_mask,
)
from modjax.nn.sharding import batch_shards, constrain, per_sequence
from modjax.spec.mod import MoDConfig, cache_slots, selected_tokens

# Runs selected positions: (new x, whatever else) of a Selection.
Process = Callable[[Selection], tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoDWrite:
    """What is to be written: taken_B and missed_B more positions of each row."""

    inner: Any
    taken_B: jax.Array
    missed_B: jax.Array

    def padded(self, length: int) -> "MoDWrite":
        return dataclasses.replace(self, inner=padded(self.inner, length))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inner", "taken_B", "missed_B"), meta_fields=("slots",),
)  # fmt: skip
@dataclass(frozen=True)
class MoDCache:
    """The cache of the inner layer, which has room for `slots` positions of each row.

    taken_B: those in it. missed_B: those that found no room, and passed the layer by.
    """

    inner: Any
    taken_B: jax.Array
    missed_B: jax.Array
    slots: int

    @property
    def overflow_B(self) -> jax.Array:
        return self.missed_B

    def written(self, write: MoDWrite, *, fresh: bool = False) -> "MoDCache":
        return MoDCache(written(self.inner, write.inner, fresh=fresh),
                        self.taken_B + write.taken_B, self.missed_B + write.missed_B,
                        self.slots)  # fmt: skip


class Routing(nnx.Module):
    """How a routed layer selects positions, in training and without the future."""

    def __init__(self, config: MoDConfig, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.router: Any = ROUTERS[config.router](d_model, config, rngs=rngs)
        self.threshold = measured((1,))
        self.predictor = Predictor(d_model, rngs=rngs) if config.predictor_weight > 0 else None

    def route(
        self, x_BLD: jax.Array, at: At, call: Call, spent_B: jax.Array, room_B: jax.Array | None,
        most: int, process: Process,
    ) -> tuple[jax.Array, Any, Routed]:  # fmt: skip
        """New x, what `process` returned beside it, and the record.

        spent_B: how many earlier positions of each row have asked. room_B: how many can be taken
        now where `call.routing` never looks ahead; None, `most`, which bounds all rows.
        """
        length = x_BLD.shape[1]
        ranking = self.router(x_BLD, at, call.key)
        target, wanted_BL, kth_B = self._as_trained(ranking, at, length)
        target_BL = selected_mask(target, length)
        losses = dict(ranking.losses)
        auxiliary_BL = predictor_BL = None
        if self.config.teaches_router:
            auxiliary_BL = ranking.scores_BL
            loss_B = _cross_entropy(auxiliary_BL, target_BL, at.valid_BL)
            losses["auxiliary"] = self.config.auxiliary_weight * loss_B
        if self.predictor is not None:
            predictor_BL = self.predictor(x_BLD, ranking.scores_BL)
            loss_B = _cross_entropy(predictor_BL, target_BL, at.valid_BL)
            losses["predictor"] = self.config.predictor_weight * loss_B
        record = Routed(
            scores_BL=ranking.scores_BL, target_BL=target_BL, wanted_BL=wanted_BL,
            selected_BL=target_BL, predictor_BL=predictor_BL, auxiliary_BL=auxiliary_BL,
            k_B=jnp.full(x_BLD.shape[0], selected_tokens(self.config.capacity, length)),
            kth_B=kth_B, losses=losses,
        )  # fmt: skip
        if call.routing == "trained":
            return (*process(target), record)
        wanted_BL = _and(self.wanted(x_BLD, ranking, at, call.routing, spent_B), at.valid_BL)
        room_B1 = most if room_B is None else room_B[:, None]
        selected_BL = wanted_BL & (jnp.cumsum(wanted_BL, axis=1) <= room_B1)
        record = dataclasses.replace(record, wanted_BL=wanted_BL, selected_BL=selected_BL)

        def with_room_for(room: int) -> Callable[[], tuple[jax.Array, Any]]:
            return lambda: process(select_first_k(selected_BL, ranking.scores_BL, room))

        # What a nested layer reports has the width of its selection: one size only.
        reports = jax.tree.leaves(
            jax.eval_shape(with_room_for(most))[1], is_leaf=lambda node: isinstance(node, Record)
        )
        nested = any(isinstance(node, Record) for node in reports)
        # Static shapes, none dropped: of a few compiled sizes, the first that holds every row.
        rooms = _rooms(selected_tokens(self.config.capacity, length), most)
        if nested or len(rooms) == 1:
            return (*with_room_for(most)(), record)
        most_wanted = jnp.max(jnp.sum(selected_BL, axis=1))
        index = jnp.searchsorted(jnp.array(rooms), most_wanted)
        return (*jax.lax.switch(index, [with_room_for(room) for room in rooms]), record)

    def wanted(
        self, x_BLD: jax.Array, ranking: Ranking, at: At, routing: str, spent_B: jax.Array
    ) -> jax.Array:
        """Which positions ask to be processed, never looking ahead: (B, L) bool."""
        own_BL = self.router.wants(ranking, at, self.bar())
        if own_BL is not None and routing not in ("predictor", "paced"):
            return own_BL
        if routing == "router":
            return ranking.scores_BL > 0
        if routing == "threshold":
            return ranking.ranking_BL > self.bar()
        if routing in ("predictor", "paced") and self.predictor is not None:
            odds_BL = self.predictor(x_BLD, ranking.scores_BL)
            if routing == "predictor":
                return odds_BL > 0
            return paced(odds_BL, self.config.capacity, at.positions_BL, spent_B)
        raise ValueError(f"routing {routing!r}: this layer cannot select by it")

    def bar(self) -> jax.Array:
        """The measured threshold."""
        return jax.lax.stop_gradient(self.threshold[...])[0]

    def update(self, scores_BK: jax.Array, x_BKD: jax.Array, y_BKD: jax.Array) -> jax.Array:
        """What is added to the stream at selected positions, for each reading of Eq. 1."""
        weight_BK = self.router.weigh(scores_BK).astype(x_BKD.dtype)
        weight = weight_BK.reshape(weight_BK.shape + (1,) * (x_BKD.ndim - 2))
        y_BKD = y_BKD.astype(x_BKD.dtype)
        return weight * (y_BKD - x_BKD if self.config.residual == "delta" else y_BKD)

    def _as_trained(self, ranking: Ranking, at: At, length: int):
        """What training selects, which positions asked to be, and each row's k-th best rank.

        The rank is infinite where a row has fewer positions.
        """
        k = selected_tokens(self.config.capacity, length)
        wanted_BL = self.router.wants(ranking, at, self.bar())
        if wanted_BL is None:
            selection = select_top_k(ranking.ranking_BL, ranking.scores_BL, k, at.valid_BL)
            rank_BK = gather(jax.lax.stop_gradient(ranking.ranking_BL), selection.indices_BK)
            kth_B = jnp.min(jnp.where(selection.valid_BK, rank_BK, -jnp.inf), axis=1)
            return selection, selected_mask(selection, length), kth_B
        room = selected_tokens(self.config.room, length)
        wanted_BL = _and(wanted_BL, at.valid_BL)
        selection = select_first_k(wanted_BL, ranking.scores_BL, room)
        rank_BL = jax.lax.stop_gradient(ranking.ranking_BL)
        rank_BL = rank_BL if at.valid_BL is None else jnp.where(at.valid_BL, rank_BL, -jnp.inf)
        kth_B = per_sequence(lambda rank_BL: jax.lax.top_k(rank_BL, k)[0][:, -1], rank_BL)
        return selection, wanted_BL, kth_B


class MoD(Routing):
    """Routes the k = max(1, round(capacity * L)) best-scored positions through a layer.

    Eq. 1 of arXiv 2404.02258. The inner layer sees the selected positions only, in order, with
    what belongs to them; what it reports, its losses among it, is passed on.
    """

    def __init__(self, spec: spec.MoD, shape: spec.Shape, *, rngs: nnx.Rngs):
        self.inner = build(spec.inner, shape, rngs=rngs)
        super().__init__(spec, shape.d_model, rngs=rngs)

    def __call__(self, x: jax.Array, at: At, call: Call, cache: MoDCache | None = None) -> Out:
        batch, length = x.shape[:2]
        positions_BL = jnp.broadcast_to(at.positions_BL, (batch, length))
        at = at._replace(positions_BL=positions_BL)
        if cache is not None and length == 1 and not call.fresh:
            return self._decode(x, at, call, cache)
        slots = cache_slots(self.config.capacity, length, call.slack)
        most = slots if cache is None else min(cache.slots, length)
        spent_B = jnp.zeros(batch, jnp.int32)
        room_B = None
        if cache is not None and not call.fresh:
            spent_B, room_B = cache.taken_B + cache.missed_B, cache.slots - cache.taken_B

        def process(selection: Selection) -> tuple[jax.Array, Any]:
            part, part_at = jax.tree.map(
                lambda leaf: gather(leaf, selection.indices_BK), (x, at._replace(valid_BL=None))
            )
            part = constrain(part, "batch", "length", *[None] * (x.ndim - 2))
            part_at = part_at._replace(valid_BL=selection.valid_BK)
            inner_cache = None if cache is None else cache.inner
            out = self.inner(part, part_at, call.inside(0), inner_cache)
            update = self.update(selection.scores_BK, part, out.x)
            write = out.write
            if cache is not None and call.routing != "trained":
                write = padded(write, most)  # every compiled size returns one shape
            records = {name: Inside(record, selection.indices_BK, selection.valid_BK)
                       for name, record in out.records.items()}  # fmt: skip
            return scatter_add(x, selection.indices_BK, update), (write, records)

        x_new, (write, nested), record = self.route(x, at, call, spent_B, room_B, most, process)
        if cache is not None:
            taken_B = jnp.sum(record.selected_BL, axis=1, dtype=jnp.int32)
            missed_B = jnp.sum(record.wanted_BL, axis=1, dtype=jnp.int32) - taken_B
            write = MoDWrite(write, taken_B, missed_B)
        return Out(x_new, write, {"": record} | under("inner", nested))

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> MoDCache:
        """A cache for sequences of at most `length` positions, or slack * capacity of them."""
        slots = cache_slots(self.config.capacity, length, slack)
        none_B = jnp.zeros(batch, jnp.int32)
        return MoDCache(empty(self.inner, batch, slots, slack, dtype), none_B, none_B, slots)

    def _decode(self, x: jax.Array, at: At, call: Call, cache: MoDCache) -> Out:
        """One position per row. Rows that are not routed are not computed; where none is, the
        weights of the inner layer are not read. Only what the outermost selection did is reported.
        """
        ranking = self.router(x, at, call.key)
        spent_B = cache.taken_B + cache.missed_B
        wanted_BL = _and(self.wanted(x, ranking, at, call.routing, spent_B), at.valid_BL)
        routed_BL = wanted_BL & (cache.taken_B < cache.slots)[:, None]
        x, write = self._rows(x, at, call, cache.inner, ranking.scores_BL, routed_BL)
        missed_B = jnp.sum(wanted_BL & ~routed_BL, axis=1, dtype=jnp.int32)
        taken_B = jnp.sum(routed_BL, axis=1, dtype=jnp.int32)
        none_B = jnp.zeros_like(ranking.scores_BL[:, 0])
        record = Routed(ranking.scores_BL, routed_BL, wanted_BL, routed_BL, None, None, none_B,
                        none_B, {})  # fmt: skip
        return Out(x, MoDWrite(write, taken_B, missed_B), {"": record})

    def _rows(self, x, at: At, call: Call, cache, scores_BL, routed_BL):
        """Runs the routed rows only: of a few compiled numbers of rows, the first that holds them.

        Rows are moved within a shard of the batch, never between two.
        """
        shards = batch_shards(x.shape[0])
        rows = x.shape[0] // shards
        routed_PR = routed_BL.reshape(shards, rows)
        order_PR = jnp.argsort(~routed_PR, axis=1, stable=True)
        sizes = [0, *(2**i for i in range(math.ceil(math.log2(rows)))), rows]
        inputs = (x, at._replace(valid_BL=routed_BL), scores_BL, cache)

        def run(part):
            x, at, scores_BL, cache = part
            out = self.inner(x, at, call.inside(0), cache)
            updated = x + self.update(scores_BL, x, out.x)
            routed = at.valid_BL.reshape(at.valid_BL.shape + (1,) * (x.ndim - 2))
            return jnp.where(routed, updated, x), out.write

        none = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(run, inputs)[1])

        def of(size: int):
            def branch():
                if size == 0:
                    return x, none
                if size == rows:
                    return run(inputs)
                order_PS = order_PR[:, :size]
                found = run(jax.tree.map(lambda leaf: _take(leaf, order_PS), inputs))
                return jax.tree.map(lambda old, new: _put(old, new, order_PS), (x, none), found)

            return branch

        most = jnp.max(jnp.sum(routed_PR, axis=1))
        return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), most), [of(s) for s in sizes])


class MoDBlock(Routing):
    """The same around any block of yours.

    `inner` maps (x_BKD, *per_position, **pairwise, **whole) to x_BKD or to (x_BKD, extra) and sees
    the selected positions only, in order, with what belongs to them.
    """

    def __init__(self, inner: nnx.Module, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.inner = inner
        super().__init__(config, d_model, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        *per_position: Any,
        pairwise: Mapping[str, Any] | None = None,
        whole: Mapping[str, Any] | None = None,
        valid_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        handed: Mapping[str, jax.Array] | None = None,
        routing: str = "trained",
        slots: int | None = None,
    ) -> tuple[jax.Array, Routed]:
        """Returns x_BLD and the record of what was routed; add its `loss()` to your objective.

        per_position: pytrees of arrays (B or 1, L, ...) that `inner` takes beside x: positions,
          segment ids, rotary tables. Each is gathered like x.
        pairwise: keyword arguments of `inner` between two positions, (B or 1, heads or 1, L, L),
          like the masks of nnx.make_causal_mask. Each is gathered along both. Where a row selects
          fewer than K, the entries left over see themselves (1), and no other sees them (0): a
          bias needs a mask beside it.
        whole: keyword arguments that `inner` gets as they are, like the output of an encoder.
        valid_BL: False marks padding, which is never selected.
        key: for random routing. handed: what a router needs of an earlier layer, by name.
        routing: "trained" selects as in training; "router", "predictor" and "threshold" let each
          position decide for itself, "paced" by the predictor and what its row has spent. They
          drop none, or those beyond the first `slots` of a row.

        Raises InputError for an argument of another shape.
        """
        batch, length = x_BLD.shape[:2]
        inputs = per_position, dict(pairwise or {})
        check_inputs(*inputs, batch, length)
        positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
        at = At(positions_BL, None, valid_BL, {}, dict(handed or {}))

        def process(selection: Selection) -> tuple[jax.Array, Any]:
            x_BKD, per_position = jax.tree.map(
                lambda leaf: gather(leaf, selection.indices_BK), (x_BLD, inputs[0])
            )
            pairwise = jax.tree.map(lambda leaf: gather_pairs(leaf, selection), inputs[1])
            x_BKD = constrain(x_BKD, "batch", "length", None)
            out = self.inner(x_BKD, *per_position, **pairwise, **(whole or {}))  # type: ignore[operator]
            y_BKD = out[0] if isinstance(out, tuple) else out
            update_BKD = self.update(selection.scores_BK, x_BKD, y_BKD)
            return scatter_add(x_BLD, selection.indices_BK, update_BKD), ()

        most = length if slots is None else min(slots, length)
        none_B = jnp.zeros(batch, jnp.int32)
        call = Call(routing=routing, key=key)
        x_BLD, _, record = self.route(x_BLD, at, call, none_B, None, most, process)
        return x_BLD, record


def _take(leaf: jax.Array, order_PS: jax.Array) -> jax.Array:
    """Rows of a leaf (B, ...), within each of the P shards."""
    shards, size = order_PS.shape
    parts = leaf.reshape(shards, -1, *leaf.shape[1:])
    return jax.vmap(lambda part, order: part[order])(parts, order_PS).reshape(
        shards * size, *leaf.shape[1:]
    )


def _put(old: jax.Array, new: jax.Array, order_PS: jax.Array) -> jax.Array:
    """A leaf (B, ...) with those rows replaced."""
    shards = order_PS.shape[0]
    old_parts, new_parts = (x.reshape(shards, -1, *old.shape[1:]) for x in (old, new))
    put = jax.vmap(lambda old, new, order: old.at[order].set(new))
    return put(old_parts, new_parts, order_PS).reshape(old.shape)


def _and(wanted_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    return wanted_BL if valid_BL is None else wanted_BL & valid_BL


def _rooms(k: int, bound: int) -> list[int]:
    """Compiled sizes: 3/2 k for what is usual, 3 k, and `bound`. Each costs time to compile."""
    return [room for room in (math.ceil(1.5 * k), 3 * k) if room < bound] + [bound]


def _cross_entropy(
    logits_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array | None
) -> jax.Array:
    """Each row's mean binary cross-entropy over valid positions, (B,)."""
    sign_BL = jnp.where(target_BL, 1.0, -1.0)
    return masked_mean(jax.nn.softplus(-sign_BL * logits_BL), valid_BL)
