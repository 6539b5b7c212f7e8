"""Mixture of experts in an MLP's place: a router, and what its picks add to the stream.

Legend: B batch, S positions, K picks of a position, R rows of the router, E experts, C positions of
an expert's share, N = B * E, D model width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax import spec
from modjax.kernels import project, project_back
from modjax.nn.call import At, Call, Out
from modjax.nn.expert_record import Routing
from modjax.nn.experts import (
    MATRIX_AXES,
    Picks,
    in_groups,
    in_slots,
    one_by_one,
    slots_of,
    taken,
)
from modjax.nn.layers import Sublayer, depth_scale, mlp, mlp_weights
from modjax.nn.params import measured, normal_param
from modjax.nn.routers import linear
from modjax.nn.routing import kth_best, of_valid, position_noise, select_top_k, selected_mask

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
# So few positions are computed expert by expert: they do little but read the experts' weights.
FEW = 16


class MoE(Sublayer):
    """Token choice, expert choice or threshold routing over experts; see the spec."""

    def __init__(self, spec: spec.MoE, shape: spec.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        self.spec = spec
        d, f, e = shape.d_model, spec.expert_width(shape), spec.experts
        self.w = normal_param(
            rngs, (d, spec.rows), ("replicated", None), std=1 / math.sqrt(d), role="router"
        )
        std = {"w_out": 1 / math.sqrt(f) / depth_scale(shape)}

        def matrices(*stacked: int) -> nnx.Dict:
            axes = MATRIX_AXES[-2 - len(stacked) :]
            width = f if stacked else f * spec.shared
            return nnx.Dict(
                {
                    name: normal_param(
                        rngs,
                        (*stacked, d, width),
                        axes,
                        std=std.get(name, 1 / math.sqrt(d)),
                        transposed=name == "w_out",
                    )
                    for name in mlp_weights(spec.activation)
                }
            )

        self.experts: Any = matrices(e)  # or a list of each one's, see take_apart
        self.shared = matrices() if spec.shared else None
        self.bias = measured((spec.rows,)) if spec.bias_rate else None
        self.threshold = measured((e,)) if spec.router == "threshold" else None

    def __call__(self, x_BSD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        spec, (batch, length) = self.spec, x_BSD.shape[:2]
        valid_BS = jnp.ones((batch, length), bool) if at.valid_BL is None else at.valid_BL
        y_BSD = self.before(x_BSD)
        logits_BSR = linear(y_BSD, self.w[...])
        scores_BSR = SCORES[spec.scores](logits_BSR)
        size_B = of_valid(spec.slots, at.valid_BL, batch, length)
        tied_BE = None
        if spec.router == "token_choice":
            picks, picks_BR = self._token_choice(scores_BSR, at, valid_BS, call.key)
        else:
            picks, tied_BE = self._experts_own(scores_BSR, valid_BS, size_B)
            picks_BR = jnp.sum(picks.experts_BSK < spec.experts, axis=1)
        asked_BS = taken_BS = jnp.sum(picks.experts_BSK < spec.experts, axis=2)
        computed_B = jnp.sum(asked_BS, axis=1)
        if call.routing == "trained" and spec.capacity_factor is not None:
            slots = slots_of(picks, spec.experts, spec.slots(length), size_B)
            taken_BS = taken(slots, length)
            computed_B = jnp.full(batch, spec.computed(length))
            z_BSD = in_slots(y_BSD, slots, self._stacked(), spec.activation)
        elif batch * length <= FEW:
            z_BSD = one_by_one(y_BSD, picks, self._each(), spec.activation)
        else:
            z_BSD = in_groups(y_BSD, picks, self._stacked(), spec.activation)
        if self.shared is not None:
            weights = {name: w[...] for name, w in self.shared.items()}
            z_BSD = z_BSD + mlp(y_BSD, weights, spec.activation, project, project_back)
        probability_BSR = scores_BSR / jnp.sum(scores_BSR, axis=2, keepdims=True)
        z_BS = jnp.square(jax.nn.logsumexp(logits_BSR, axis=2))
        record = Routing(
            asked_BS=asked_BS,
            taken_BS=taken_BS,
            valid_BS=valid_BS,
            experts_BSK=picks.experts_BSK,
            picks_BR=picks_BR.astype(jnp.float32),
            probability_BR=jnp.sum(jnp.where(valid_BS[..., None], probability_BSR, 0.0), axis=1),
            z_B=jnp.sum(jnp.where(valid_BS, z_BS, 0.0), axis=1),
            computed_B=computed_B.astype(jnp.float32),
            kth_BE=None if self.threshold is None else self._kth(scores_BSR, at.valid_BL),
            spec=spec,
            tied_BE=tied_BE,
        )
        depth_BS = (record.taken_BS > 0).astype(jnp.int32) if self.spec.no_ops else 0
        return Out(self.added(x_BSD, z_BSD), (), {"": record}, {}, depth_BS)

    def _token_choice(
        self, scores_BSR: jax.Array, at: At, valid_BS: jax.Array, key: jax.Array | None
    ) -> tuple[Picks, jax.Array]:
        """Each position's best rows, and how often each row was picked: (B, R)."""
        spec = self.spec
        ranking_BSR = jax.lax.stop_gradient(scores_BSR)
        if self.bias is not None:
            ranking_BSR += self.bias[...][None, None]
        rows, of_row = [], []  # a top-k of few, one after another, moves nothing between devices
        for _ in range(spec.top_k):
            rows.append(jnp.argmax(ranking_BSR, axis=2))
            of_row.append(jax.nn.one_hot(rows[-1], spec.rows, dtype=bool))
            ranking_BSR = jnp.where(of_row[-1], -jnp.inf, ranking_BSR)
        rows_BSK, of_row_BSKR = jnp.stack(rows, axis=2), jnp.stack(of_row, axis=2)
        weights_BSK = jnp.sum(jnp.where(of_row_BSKR, scores_BSR[:, :, None], 0.0), axis=3)
        if spec.renormalise:
            # Over no-ops, too: the weight of a single expert would be 1 whatever the router says.
            total_BS1 = jnp.sum(weights_BSK, axis=2, keepdims=True)
            weights_BSK /= jnp.where(total_BS1 > 0, total_BS1, 1.0)  # sigmoids may underflow
        real_BSK = (rows_BSK < spec.experts) & valid_BS[..., None]
        if spec.random_no_ops:
            real_BSK &= ~self._by_chance(at, key)
        weights_BSK = jnp.where(real_BSK, weights_BSK, 0.0)
        picks = Picks(jnp.where(real_BSK, rows_BSK, spec.experts), spec.scale * weights_BSK)
        return picks, jnp.sum(of_row_BSKR & valid_BS[..., None, None], axis=(1, 2))

    def _by_chance(self, at: At, key: jax.Array | None) -> jax.Array:
        """Which picks are no-ops at random, alike whether read at once or token by token."""
        if key is None:
            raise ValueError("random no-ops need a PRNG key: model(tokens, key=...)")
        keys = [jax.random.fold_in(key, pick) for pick in range(self.spec.top_k)]
        each = [position_noise(key, at.sequences_BL, at.positions_BL) for key in keys]
        noise_BSK = jnp.stack(each, axis=2)
        return jax.scipy.special.ndtr(noise_BSK) >= self.spec.real

    def _experts_own(
        self, scores_BSE: jax.Array, valid_BS: jax.Array, size_B: jax.Array
    ) -> tuple[Picks, jax.Array | None]:
        """Picks for each expert the best of the sequence, or all that pass its threshold.

        Returns, beside the picks, whether each expert's best end in a near tie, (B, E).
        """
        batch, length, experts = scores_BSE.shape
        tied_BE = None
        if self.threshold is not None:
            mine_BSE = scores_BSE > jax.lax.stop_gradient(self.threshold[...])[None, None]
        else:
            rows_NS = scores_BSE.swapaxes(1, 2).reshape(-1, length)
            valid_NS, size_N = (jnp.repeat(x, experts, axis=0) for x in (valid_BS, size_B))
            best = select_top_k(rows_NS, rows_NS, self.spec.slots(length), valid_NS, size_N)
            mine_BES = selected_mask(best, length).reshape(batch, experts, length)
            mine_BSE = mine_BES.swapaxes(1, 2)
            tied_BE = jnp.reshape(best.tied_B, (batch, experts))
        mine_BSE &= valid_BS[..., None]
        own_11E = jnp.arange(experts)[None, None]
        picks = Picks(jnp.where(mine_BSE, own_11E, experts), self.spec.scale * scores_BSE)
        return picks, tied_BE

    def _kth(self, scores_BSE: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
        """Returns the score at which each expert would take its share of a sequence: (B, E)."""
        batch, length, experts = scores_BSE.shape

        def share(positions: int) -> int:
            return max(1, round(self.spec.top_k * positions / experts))

        scores_BSE = jax.lax.stop_gradient(scores_BSE)
        if valid_BS is not None:
            scores_BSE = jnp.where(valid_BS[..., None], scores_BSE, -jnp.inf)
        rows_NS = scores_BSE.swapaxes(1, 2).reshape(-1, length)
        share_N = jnp.repeat(of_valid(share, valid_BS, batch, length), experts)
        return kth_best(rows_NS, share(length), share_N).reshape(batch, experts)

    def take_apart(self) -> None:
        """Keeps the experts apart from now on, so that a step reads those that it uses only."""
        if not isinstance(self.experts, nnx.List):
            each = [{name: nnx.Param(w) for name, w in one.items()} for one in self._each()]
            self.experts = nnx.List([nnx.Dict(one) for one in each])

    def _each(self) -> list[dict[str, jax.Array]]:
        if isinstance(self.experts, nnx.List):
            return [{name: w[...] for name, w in one.items()} for one in self.experts]
        stacked = {name: w[...] for name, w in self.experts.items()}
        return [{name: w[e] for name, w in stacked.items()} for e in range(self.spec.experts)]

    def _stacked(self) -> dict[str, jax.Array]:
        if isinstance(self.experts, nnx.List):
            return jax.tree.map(lambda *each: jnp.stack(each), *self._each())
        return {name: w[...] for name, w in self.experts.items()}
