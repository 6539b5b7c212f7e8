"""What every routed layer shares: how it selects positions, in training and without the future.

Legend: B batch, L positions, K selected positions, D model width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.nn.call import At, Call
from modjax.nn.params import measured
from modjax.nn.routed import Routed
from modjax.nn.routers import ROUTERS, Predictor, Ranking, masked_mean
from modjax.nn.routing import (
    Selection,
    kth_best,
    of_valid,
    paced,
    select_first_k,
    select_top_k,
    selected_mask,
    wide,
)
from modjax.nn.within import widened
from modjax.spec.mod import MoDConfig, selected_tokens

Process = Callable[[Selection], Any]  # runs selected positions


class RoutedLayer(nnx.Module):
    """A router, a measured threshold and perhaps a predictor, and what is selected by them."""

    def __init__(self, config: MoDConfig, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.router: Any = ROUTERS[config.router](d_model, config, rngs=rngs)
        self.threshold = measured((1,))
        self.predictor = Predictor(d_model, rngs=rngs) if config.predictor_weight > 0 else None

    def route(
        self,
        x_BLD: jax.Array,
        at: At,
        call: Call,
        spent_B: jax.Array,
        room_B: jax.Array | None,
        most: int,
        process: Process,
    ) -> tuple[Any, Routed]:
        """Returns what `process` returns for the selection, and the record.

        Where `call.routing` never looks ahead, `process` is compiled for a few sizes, and what it
        returns is as of `most`, see `widened`.
        spent_B: how many earlier positions of each row have asked. room_B: how many can be taken
          now; None, `most`, which bounds all rows.
        """
        batch, length = x_BLD.shape[:2]
        ranking = self.router(x_BLD, at, call.key)
        k_B = of_valid(self._k, at.valid_BL, batch, length)
        target, wanted_BL, kth_B = self._as_trained(ranking, at, k_B)
        target_BL = selected_mask(target, length)
        wanted_BL = target_BL if wanted_BL is None else wanted_BL
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
            scores_BL=ranking.scores_BL,
            target_BL=target_BL,
            wanted_BL=wanted_BL,
            selected_BL=target_BL,
            predictor_BL=predictor_BL,
            auxiliary_BL=auxiliary_BL,
            k_B=k_B,
            kth_B=kth_B,
            losses=losses,
            tied_B=target.tied_B,
        )
        if call.routing == "trained":
            return process(target), record
        wanted_BL = valid_ones(self.wanted(x_BLD, ranking, at, call.routing, spent_B), at.valid_BL)
        room_B1 = most if room_B is None else room_B[:, None]
        selected_BL = wanted_BL & (jnp.cumsum(wanted_BL, axis=1) <= room_B1)
        record = dataclasses.replace(record, wanted_BL=wanted_BL, selected_BL=selected_BL)

        def run(room: int) -> Any:
            return process(select_first_k(selected_BL, ranking.scores_BL, room))

        # Static shapes, none dropped: of a few compiled sizes, the first that holds every row.
        rooms = _rooms(self._k(length), most)
        if len(rooms) == 1:
            return run(most), record
        like = jax.eval_shape(lambda: run(most))
        sizes = [lambda room=room: widened(run(room), like) for room in rooms]
        most_wanted = jnp.max(jnp.sum(selected_BL, axis=1))
        index = jnp.searchsorted(jnp.array(rooms), most_wanted)
        return jax.lax.switch(index, sizes), record

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
        weight = wide(self.router.weigh(scores_BK).astype(x_BKD.dtype), x_BKD)
        y_BKD = y_BKD.astype(x_BKD.dtype)
        return weight * (y_BKD - x_BKD if self.config.residual == "delta" else y_BKD)

    def _k(self, positions: int) -> int:
        """Returns how many of a row's valid positions the capacity stands for."""
        return selected_tokens(self.config.capacity, positions)

    def _as_trained(
        self, ranking: Ranking, at: At, k_B: jax.Array
    ) -> tuple[Selection, jax.Array | None, jax.Array]:
        """Selects as training does.

        Returns the selection, the positions that asked for it (None: those selected), and each
        row's k_B-th best rank, infinite in a row of padding.
        """
        scores_BL, rank_BL = ranking.scores_BL, jax.lax.stop_gradient(ranking.ranking_BL)
        batch, length = scores_BL.shape
        wanted_BL = self.router.wants(ranking, at, self.bar())
        if wanted_BL is None:
            selection = select_top_k(rank_BL, scores_BL, self._k(length), at.valid_BL, k_B)
            return selection, None, selection.kth_B

        def room(positions: int) -> int:
            return selected_tokens(self.config.room, positions)

        room_B = of_valid(room, at.valid_BL, batch, length)
        wanted_BL = valid_ones(wanted_BL, at.valid_BL)
        selection = select_first_k(wanted_BL, scores_BL, room(length), room_B)
        rank_BL = rank_BL if at.valid_BL is None else jnp.where(at.valid_BL, rank_BL, -jnp.inf)
        return selection, wanted_BL, kth_best(rank_BL, self._k(length), k_B)


def valid_ones(wanted_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """The wanted positions that are no padding."""
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
