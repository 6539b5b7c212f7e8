"""Mixture-of-Depths: a wrapper that lets any block process only a share of the positions.

Legend: B batch, L positions, K selected positions, D model width, A routed blocks, G groups.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.config import MoDConfig
from modjax.flops import selected_tokens
from modjax.nn.cache import KVCache, append, filled, last, with_slots
from modjax.nn.routers import At, ExpertChoice, Predictor, Ranking, masked_mean
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
from modjax.nn.sharding import constrain, per_sequence

BlockAux = dict[str, Any]


class Statistic(nnx.Param):
    """A number that training measures and no gradient reaches."""


class MoDBlock(nnx.Module):
    """Routes the k = max(1, round(capacity * L)) best-scored positions through `inner`.

    Eq. 1 of arXiv 2404.02258. `inner` maps (x_BKD, *per_position, **pairwise, **whole) to x_BKD or
    to (x_BKD, extra) and sees the selected positions only, in order, with what belongs to them.
    router: what ranks and selects, a class of modjax.nn.routers.
    """

    def __init__(
        self, inner: nnx.Module, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs,
        router: Callable[..., Any] = ExpertChoice,
    ):  # fmt: skip
        self.inner = inner
        self.config = config
        self.router = router(d_model, config, rngs=rngs)
        self.threshold = Statistic(jnp.zeros(1), out_sharding=("norm",), eager_sharding=False)
        self.predictor = Predictor(d_model, rngs=rngs) if config.predictor_weight > 0 else None

    def __call__(
        self,
        x_BLD: jax.Array,
        *per_position: Any,
        pairwise: Mapping[str, Any] | None = None,
        whole: Mapping[str, Any] | None = None,
        valid_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        received_BL: jax.Array | None = None,
        routing: str = "top_k",
        slots: int | None = None,
    ) -> tuple[jax.Array, BlockAux]:
        """Returns x_BLD and aux, of which every leaf begins with the batch:

        scores_BL: the raw router scores. target_BL: what training selects of these inputs.
        wanted_BL, selected_BL: what `routing` chose, and the part of it that was processed.
        predictor_BL: logits of the predictor, where there is one. k_B, kth_B: the number that the
          capacity stands for, and the k-th best rank.
        losses: name -> (B,), weighted: add the mean of each to the objective.

        per_position: pytrees of arrays (B or 1, L, ...) that `inner` takes beside x: positions,
          segment ids, rotary tables. Each is gathered like x.
        pairwise: keyword arguments of `inner` between two positions, (B or 1, heads or 1, L, L),
          like the masks of nnx.make_causal_mask. Each is gathered along both. Where a row selects
          fewer than K, the entries left over see themselves (1), and no other sees them (0): a
          bias needs a mask beside it.
        whole: keyword arguments that `inner` gets as they are, like the output of an encoder.
        valid_BL: False marks padding, which is never selected.
        key: for random routing. received_BL: for routing by attention.
        routing: "top_k" selects as in training; "router", "predictor" and "threshold" let each
          position decide for itself, "paced" by the predictor and what its row has spent. They
          drop none, or those beyond the first `slots` of a row.

        Raises InputError for an argument of another shape.
        """
        at = _at(x_BLD, valid_BL, key, received_BL)
        inputs = per_position, dict(pairwise or {})
        check_inputs(*inputs, *x_BLD.shape[:2])
        run = functools.partial(self.inner, **(whole or {}))  # type: ignore[arg-type]
        x_BLD, _, aux = self._forward(x_BLD, inputs, at, routing, slots, run, None)
        return x_BLD, aux

    def prefill(
        self, x_BLD: jax.Array, *per_position: Any, valid_BL: jax.Array, key: jax.Array | None,
        routing: str, slots: int,
    ) -> tuple[jax.Array, BlockAux, KVCache]:  # fmt: skip
        """The call, and a cache with `slots` slots of the positions that were processed.

        `inner.prefill` returns its output and its keys and values (B, G, K, H).
        """
        at = _at(x_BLD, valid_BL, key, None)
        # Every compiled size must return caches of one shape.
        pad = functools.partial(with_slots, slots=slots)
        x_BLD, (k_BGMH, v_BGMH), aux = self._forward(
            x_BLD, (per_position, {}), at, routing, slots, self.inner.prefill, pad  # type: ignore[attr-defined]
        )  # fmt: skip
        length_B = jnp.sum(aux["selected_BL"], axis=1)
        overflow_B = jnp.sum(aux["wanted_BL"], axis=1) - length_B
        return x_BLD, aux, filled(k_BGMH, v_BGMH, length_B, overflow_B, slots)

    def decode(
        self, x_B1D: jax.Array, *per_position: Any, positions_B: jax.Array, active_B: jax.Array,
        cache: KVCache, key: jax.Array | None, routing: str,
    ) -> tuple[jax.Array, KVCache, jax.Array]:  # fmt: skip
        """One token per row: new x, new cache, and which rows were processed.

        Rows that are not routed are not computed; where none is, the weights of `inner` are not
        read. A token that finds no slot passes the block by, and is counted in the cache.
        `inner.decode(x, *per_position, cache, write_B)` returns its output and the cache with the
        token in the rows of `write_B`.
        """
        at = At(positions_B[:, None], active_B[:, None], key, None)
        ranking = self.router(x_B1D, at)
        spent_B = cache.length_B + cache.overflow_B
        wanted_B = self._wanted(x_B1D, ranking, at, routing, spent_B)[:, 0] & active_B
        routed_B = wanted_B & (cache.length_B < cache.k_BGMH.shape[2])
        x_B1D, k_BG1H, v_BG1H = self._decode_rows(
            x_B1D, per_position, ranking.scores_BL, routed_B, cache
        )
        dropped_B = (wanted_B & ~routed_B).astype(jnp.int32)
        cache = cache._replace(overflow_B=cache.overflow_B + dropped_B)
        return x_B1D, append(cache, k_BG1H, v_BG1H, routed_B), routed_B

    def _forward(self, x_BLD, inputs, at, routing, slots, run, pad):
        """New x, what `run` returned beside it, through `pad`, and aux."""
        length = x_BLD.shape[1]
        ranking = self.router(x_BLD, at)
        target, wanted_BL, kth_B = self._training_selection(ranking, at, length)
        target_BL = selected_mask(target, length)
        aux: BlockAux = {
            "scores_BL": ranking.scores_BL,
            "target_BL": target_BL,
            "kth_B": kth_B,
            "k_B": jnp.full(x_BLD.shape[0], selected_tokens(self.config.capacity, length)),
            "losses": dict(ranking.losses),
        }
        if self.config.auxiliary_weight > 0:
            loss_B = _cross_entropy(ranking.scores_BL, target_BL, at.valid_BL)
            aux["losses"]["auxiliary"] = self.config.auxiliary_weight * loss_B
        if self.predictor is not None:
            aux["predictor_BL"] = self.predictor(x_BLD, ranking.scores_BL)
            loss_B = _cross_entropy(aux["predictor_BL"], target_BL, at.valid_BL)
            aux["losses"]["predictor"] = self.config.predictor_weight * loss_B
        if routing == "top_k":
            aux |= {"wanted_BL": wanted_BL, "selected_BL": target_BL}
            x_BLD, extra = self._process(x_BLD, inputs, target, run)
            return x_BLD, extra if pad is None else pad(extra), aux
        none_B = jnp.zeros(x_BLD.shape[0], jnp.int32)
        wanted_BL = _and(self._wanted(x_BLD, ranking, at, routing, none_B), at.valid_BL)
        bound = length if slots is None else min(slots, length)
        selected_BL = wanted_BL & (jnp.cumsum(wanted_BL, axis=1) <= bound)
        aux |= {"wanted_BL": wanted_BL, "selected_BL": selected_BL}

        def with_room_for(room):
            def branch():
                selection = select_first_k(selected_BL, ranking.scores_BL, room)
                new_BLD, extra = self._process(x_BLD, inputs, selection, run)
                return (new_BLD, extra if pad is None else pad(extra))

            return branch

        # Static shapes, none dropped: of a few compiled sizes, the first that holds every row.
        rooms = _rooms(selected_tokens(self.config.capacity, length), bound)
        most = jnp.max(jnp.sum(selected_BL, axis=1))
        index = jnp.searchsorted(jnp.array(rooms), most)
        x_BLD, extra = jax.lax.switch(index, [with_room_for(room) for room in rooms])
        return x_BLD, extra, aux

    def _training_selection(self, ranking: Ranking, at: At, length: int):
        """What training selects, which positions asked to be, and each row's k-th best rank.

        The rank is infinite where a row has fewer positions.
        """
        k = selected_tokens(self.config.capacity, length)
        wanted_BL = self.router.wants(ranking, at, self._threshold())
        if wanted_BL is None:
            selection = select_top_k(ranking.ranking_BL, ranking.scores_BL, k, at.valid_BL)
            rank_BK = gather(jax.lax.stop_gradient(ranking.ranking_BL), selection.indices_BK)
            kth_B = jnp.min(jnp.where(selection.valid_BK, rank_BK, -jnp.inf), axis=1)
            return selection, selected_mask(selection, length), kth_B
        room = selected_tokens(min(1.0, self.router.slack * self.config.capacity), length)
        wanted_BL = _and(wanted_BL, at.valid_BL)
        selection = select_first_k(wanted_BL, ranking.scores_BL, room)
        rank_BL = jax.lax.stop_gradient(ranking.ranking_BL)
        rank_BL = rank_BL if at.valid_BL is None else jnp.where(at.valid_BL, rank_BL, -jnp.inf)
        kth_B = per_sequence(lambda rank_BL: jax.lax.top_k(rank_BL, k)[0][:, -1], rank_BL)
        return selection, wanted_BL, kth_B

    def _wanted(self, x_BLD, ranking: Ranking, at: At, routing: str, spent_B) -> jax.Array:
        """Which positions ask to be processed, never looking ahead: (B, L) bool.

        spent_B: how many of the positions before these have asked.
        """
        own_BL = self.router.wants(ranking, at, self._threshold())
        if own_BL is not None and routing not in ("predictor", "paced"):
            return own_BL
        if routing == "router":
            return ranking.scores_BL > 0
        if routing == "threshold":
            return ranking.ranking_BL > self._threshold()
        if routing in ("predictor", "paced") and self.predictor is not None:
            odds_BL = self.predictor(x_BLD, ranking.scores_BL)
            if routing == "predictor":
                return odds_BL > 0
            return paced(odds_BL, self.config.capacity, at.positions_BL, spent_B)
        raise ValueError(f"routing {routing!r}: this block cannot select by it")

    def _threshold(self) -> jax.Array:
        return jax.lax.stop_gradient(self.threshold[...])[0]

    def _process(self, x_BLD, inputs, selection: Selection, run) -> tuple[jax.Array, Any]:
        """Runs the selected positions and adds their weighed updates to the stream."""
        per_position, pairwise = inputs
        x_BKD, per_position = jax.tree.map(
            lambda leaf: gather(leaf, selection.indices_BK), (x_BLD, per_position)
        )
        pairwise = jax.tree.map(lambda leaf: gather_pairs(leaf, selection), pairwise)
        x_BKD = constrain(x_BKD, "batch", "length", None)
        out = run(x_BKD, *per_position, **pairwise)
        y_BKD, extra = out if isinstance(out, tuple) else (out, None)
        update_BKD = self._update(selection.scores_BK, x_BKD, y_BKD.astype(x_BLD.dtype))
        return scatter_add(x_BLD, selection.indices_BK, update_BKD), extra

    def _update(self, scores_BK, x_BKD, y_BKD) -> jax.Array:
        """What is added to the stream at selected positions, for each reading of Eq. 1."""
        weight_BK1 = self.router.weigh(scores_BK)[..., None].astype(x_BKD.dtype)
        return weight_BK1 * (y_BKD - x_BKD if self.config.residual == "delta" else y_BKD)

    def _decode_rows(self, x_B1D, per_position, scores_B1, routed_B, cache):
        """Runs the routed rows only: of a few compiled batch sizes, the first that holds them."""
        batch, heads, _, width = cache.k_BGMH.shape
        none_BG1H = jnp.zeros((batch, heads, 1, width), cache.k_BGMH.dtype)
        sizes = [0, *(2**i for i in range(math.ceil(math.log2(batch)))), batch]
        order_B = jnp.argsort(~routed_B, stable=True)

        def of(size):
            def branch():
                if size == 0:
                    return x_B1D, none_BG1H, none_BG1H
                rows = order_B[:size] if size < batch else jnp.arange(batch)
                inputs = (x_B1D, per_position, scores_B1, routed_B, cache)
                if size < batch:
                    inputs = jax.tree.map(lambda leaf: leaf[rows], inputs)
                x, per_row, scores, routed, rows_cache = inputs
                y, rows_cache = self.inner.decode(x, *per_row, rows_cache, routed)  # type: ignore[attr-defined]
                k, v = last(rows_cache)
                new = jnp.where(routed[:, None, None], x + self._update(scores, x, y), x)
                if size == batch:
                    return new, k, v
                return tuple(
                    old.at[rows].set(part)
                    for old, part in zip((x_B1D, none_BG1H, none_BG1H), (new, k, v), strict=True)
                )

            return branch

        index = jnp.searchsorted(jnp.array(sizes), jnp.sum(routed_B))
        return jax.lax.switch(index, [of(size) for size in sizes])


def _at(x_BLD, valid_BL, key, received_BL) -> At:
    positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
    return At(positions_BL, valid_BL, key, received_BL)


def _and(wanted_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    return wanted_BL if valid_BL is None else wanted_BL & valid_BL


def _rooms(k: int, bound: int) -> list[int]:
    """Compiled sizes: 3/2 k for what is usual, 3 k, and `bound`. Each costs time to compile."""
    return [room for room in (math.ceil(1.5 * k), 3 * k) if room < bound] + [bound]


def _cross_entropy(logits_BL, target_BL, valid_BL) -> jax.Array:
    """Each row's mean binary cross-entropy over valid positions, (B,)."""
    sign_BL = jnp.where(target_BL, 1.0, -1.0)
    return masked_mean(jax.nn.softplus(-sign_BL * logits_BL), valid_BL)
