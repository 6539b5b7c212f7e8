"""Rules of a mixture of experts: each turns the scores of a router into picks of experts.

Legend: B batch, L positions, P picks of a position, R scores of a position, E experts, T rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import specs
from modjax.nn.call import At, Call
from modjax.nn.layers.experts import Picks
from modjax.nn.params import measured, read
from modjax.nn.routing.losses import RouterLoad, squared_logsumexp
from modjax.nn.routing.selection import (
    Selection,
    of_valid,
    position_noise,
    select_top_k,
    selected_mask,
)
from modjax.nn.routing.thresholds import above

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


class ExpertRule(nnx.Module):
    """Base class of expert rules."""

    def __init__(self, spec: specs.ExpertRule, shape: specs.Shape, *, experts: int, rngs: nnx.Rngs):
        self.spec: Any = spec
        self.experts = experts

    def pick(
        self,
        scores_BLR: jax.Array,
        at: At,
        valid_BL: jax.Array,
        slots: Callable[[int], int],
        call: Call,
    ) -> Picks:
        """Returns the experts that process each valid position, with their weights.

        slots: maps the number of valid positions of a row to C, an expert's slots in training.
        """
        raise NotImplementedError

    def report(
        self, logits_BLR: jax.Array, scores_BLR: jax.Array, picks: Picks, valid_BL: jax.Array
    ) -> RouterLoad:
        """Returns the router's load, for losses, running statistics and metrics."""
        probability_BLR = scores_BLR / jnp.sum(scores_BLR, axis=2, keepdims=True)
        return RouterLoad(
            picks_BR=picks.rows_BR.astype(jnp.float32),
            probability_BR=jnp.sum(jnp.where(valid_BL[..., None], probability_BLR, 0.0), axis=1),
            z_B=jnp.sum(jnp.where(valid_BL, squared_logsumexp(logits_BLR), 0.0), axis=1),
            positions_B=jnp.sum(valid_BL, axis=1).astype(jnp.float32),
        )


class TokenChoice(ExpertRule):
    """Token choice: each position picks its highest-scoring experts or no-ops."""

    def __init__(
        self, spec: specs.TokenChoice, shape: specs.Shape, *, experts: int, rngs: nnx.Rngs
    ):
        super().__init__(spec, shape, experts=experts, rngs=rngs)
        self.bias = measured((spec.outputs(experts),)) if spec.bias_rate else None

    def pick(self, scores_BLR, at, valid_BL, slots, call):
        ranking_BLR = jax.lax.stop_gradient(scores_BLR)
        if self.bias is not None:
            ranking_BLR += read(self.bias)[None, None]
        rows, of_row = [], []
        # A few argmaxes in place of a top-k: they move nothing between devices.
        for _ in range(self.spec.top_k):
            rows.append(jnp.argmax(ranking_BLR, axis=2))
            of_row.append(jax.nn.one_hot(rows[-1], ranking_BLR.shape[2], dtype=bool))
            ranking_BLR = jnp.where(of_row[-1], -jnp.inf, ranking_BLR)
        rows_BLP, of_row_BLPR = jnp.stack(rows, axis=2), jnp.stack(of_row, axis=2)
        weights_BLP = jnp.sum(jnp.where(of_row_BLPR, scores_BLR[:, :, None], 0.0), axis=3)
        if self.spec.renormalise:
            # Over no-ops, too: otherwise a single expert's weight is 1 whatever the router says.
            total_BL1 = jnp.sum(weights_BLP, axis=2, keepdims=True)
            weights_BLP /= jnp.where(total_BL1 > 0, total_BL1, 1.0)  # sigmoids may underflow
        real_BLP = (rows_BLP < self.experts) & valid_BL[..., None]
        if self.spec.random_no_ops:
            real_BLP &= ~self._random_no_ops(at, call.key)
        weights_BLP = self.spec.scale * jnp.where(real_BLP, weights_BLP, 0.0)
        picked_BR = jnp.sum(of_row_BLPR & valid_BL[..., None, None], axis=(1, 2))
        return Picks(jnp.where(real_BLP, rows_BLP, self.experts), weights_BLP, picked_BR)

    def report(self, logits_BLR, scores_BLR, picks, valid_BL):
        load, spec = super().report(logits_BLR, scores_BLR, picks, valid_BL), self.spec
        return replace(load, balance=spec.balance, z=spec.z, bias=spec.bias_rate)

    def _random_no_ops(self, at: At, key: jax.Array | None) -> jax.Array:
        """Returns a random mask of the picks that become no-ops, (B, L, P) bool."""
        if key is None:
            raise ValueError("random no-ops need a PRNG key: model(tokens, key=...)")
        keys = [jax.random.fold_in(key, pick) for pick in range(self.spec.top_k)]
        each = [position_noise(key, at.sequences_BL, at.positions_BL) for key in keys]
        return jax.scipy.special.ndtr(jnp.stack(each, axis=2)) >= self.spec.real(self.experts)


class ExpertChoice(ExpertRule):
    """Expert choice: each expert picks its highest-scoring positions of a sequence."""

    def pick(self, scores_BLR, at, valid_BL, slots, call):
        batch, length, experts = scores_BLR.shape
        best = _best_positions(scores_BLR, valid_BL, slots)
        mine_BEL = selected_mask(best, length).reshape(batch, experts, length)
        tied_BE = jnp.reshape(best.tied_B, (batch, experts))
        return self._picks(mine_BEL.swapaxes(1, 2) & valid_BL[..., None], scores_BLR, tied_BE)

    def _picks(self, mine_BLE: jax.Array, scores_BLE: jax.Array, tied_BE: Any = None) -> Picks:
        own_BLE = jnp.where(mine_BLE, jnp.arange(self.experts)[None, None], self.experts)
        return Picks(own_BLE, self.spec.scale * scores_BLE, jnp.sum(mine_BLE, axis=1), tied_BE)


class ExpertThreshold(ExpertChoice):
    """Expert threshold: each expert picks the positions that score above its own threshold.

    The threshold is the running mean of the k-th best score, k being an even share of the picks.
    """

    def __init__(self, spec: specs.ExpertRule, shape: specs.Shape, *, experts: int, rngs: nnx.Rngs):
        super().__init__(spec, shape, experts=experts, rngs=rngs)
        self.threshold = measured((experts,))

    def pick(self, scores_BLR, at, valid_BL, slots, call):
        return self._picks(above(scores_BLR, self.threshold) & valid_BL[..., None], scores_BLR)

    def report(self, logits_BLR, scores_BLR, picks, valid_BL):
        def fair_share(positions: int) -> int:
            return max(1, round(self.spec.top_k * positions / self.experts))

        load = super().report(logits_BLR, scores_BLR, picks, valid_BL)
        kth_T = _best_positions(scores_BLR, valid_BL, fair_share).kth_B
        return replace(load, kth_BE=kth_T.reshape(-1, self.experts))


def _best_positions(
    scores_BLE: jax.Array, valid_BL: jax.Array, count: Callable[[int], int]
) -> Selection:
    """Selects each expert's count(n) best of n valid positions. The selection has B * E rows."""
    batch, length, experts = scores_BLE.shape
    rows_TL = scores_BLE.swapaxes(1, 2).reshape(-1, length)
    size_B = of_valid(count, valid_BL, batch, length)
    valid_TL, size_T = (jnp.repeat(x, experts, axis=0) for x in (valid_BL, size_B))
    return select_top_k(rows_TL, rows_TL, count(length), valid_TL, size_T)
