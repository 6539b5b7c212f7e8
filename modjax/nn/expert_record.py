"""Records of a mixture of experts and of its rules.

Legend: B batch, L positions, K picks of a position, R scores of a position, E experts, A layers.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record, TokenLoss, running_mean

PARTS = 4  # of a sequence, in which dropped picks are reported


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing(Record):
    """The picks of the valid positions of each sequence, and those of them that were computed.

    asked_BL, taken_BL: picks of experts of each position, and those that were computed.
    valid_BL: positions that count. experts_BLK: the experts that each picked, E for none.
    picks_B: picks of the router, no-ops among them.
    computed_B: positions that the experts computed, empty slots among them.
    tied_BE: whether an expert's best positions end within rounding of one left out, see Selection;
      None where no expert chooses.
    """

    asked_BL: jax.Array
    taken_BL: jax.Array
    valid_BL: jax.Array
    experts_BLK: jax.Array
    picks_B: jax.Array
    computed_B: jax.Array
    tied_BE: jax.Array | None = None

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns counts of every sequence.

        picks: of the router. asked: picks of experts. taken: picks computed. computed: positions
        that the experts computed. near_ties: experts whose choice ends in a near tie.
        """
        counts = {
            "picks": self.picks_B,
            "asked": jnp.sum(self.asked_BL, axis=1).astype(jnp.float32),
            "taken": jnp.sum(self.taken_BL, axis=1).astype(jnp.float32),
            "computed": self.computed_B,
        }
        if self.tied_BE is not None:
            counts["near_ties"] = jnp.sum(self.tied_BE, axis=1).astype(jnp.float32)
        return counts

    @classmethod
    def outcome(cls, counts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns moe/dropped, no_op and useful, see `statistics`, and the sum of near ties."""
        names = ("picks", "asked", "taken", "computed")
        total = {name: sum(of[name].sum() for of in counts.values()) for name in names}
        ties = [of["near_ties"].sum() for of in counts.values() if "near_ties" in of]
        found: dict[str, float] = {name: float(value) for name, value in _shares(total).items()}
        return found | ({"moe/near_ties": int(sum(ties))} if ties else {})

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars of one forward pass.

        moe/dropped: share of the experts' picks that found no slot; moe/dropped/N of 4: in that
          part of the sequences. moe/no_op: share of the picks that are of no expert.
        moe/useful: of the positions that the experts computed, the share that was picked.
        moe/idle: share of positions that no expert computed.
        """
        each = [jax.vmap(lambda record: record._scalars())(record) for record in records.values()]
        total = jax.tree.map(lambda *of_A: jnp.sum(jnp.concatenate(of_A), axis=0), *each)
        dropped_P = _share(total["asked_P"] - total["taken_P"], total["asked_P"])
        return {
            **_shares(total),
            **{f"moe/dropped/{p + 1} of {PARTS}": dropped_P[p] for p in range(PARTS)},
            "moe/idle": _share(total["idle"], total["positions"]),
        }

    def _scalars(self) -> dict[str, jax.Array]:
        counts = {name: jnp.sum(count_B) for name, count_B in self.counts(self.valid_BL).items()}
        counts.pop("near_ties", None)
        return counts | {
            "asked_P": _in_parts(self.asked_BL),
            "taken_P": _in_parts(self.taken_BL),
            "idle": jnp.sum(self.valid_BL & (self.taken_BL == 0)).astype(jnp.float32),
            "positions": jnp.sum(self.valid_BL).astype(jnp.float32),
        }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("picks_BR", "probability_BR", "z_B", "positions_B"),
    meta_fields=("balance", "z", "bias"),
)
@dataclass(frozen=True)
class Load(Record):
    """How evenly the rows of a router are used.

    picks_BR: picks of each row, before any is dropped. probability_BR: sums of the probabilities.
    z_B: sums of logsumexp(logits)^2. positions_B: valid positions.
    balance, z: weights of the two losses. bias: the rate of a bias that is moved against the load.
    """

    picks_BR: jax.Array
    probability_BR: jax.Array
    z_B: jax.Array
    positions_B: jax.Array
    balance: float = 0.0
    z: float = 0.0
    bias: float = 0.0

    def losses(self, totals: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        """Returns the losses without their weights.

        balance: R sum_r f_r P_r (arXiv 2101.03961, Eq. 4): 1 where rows are alike, R at collapse.
          f: share of the batch's picks, without gradient, before any is dropped; P: mean
          probability.
        z: the mean of logsumexp(logits)^2 (arXiv 2202.08906, Eq. 5).
        totals: of the batch that this record is a part of; None, of its own.
        """
        totals = totals or self._sums()
        picks_R = totals["picks_R"]
        share_R = picks_R / jnp.maximum(jnp.sum(picks_R), 1e-9)
        mean_R = jnp.sum(self.probability_BR, axis=0) / totals["positions"]
        balance = picks_R.shape[0] * jnp.sum(share_R * mean_R)
        return {"balance": balance, "z": jnp.sum(self.z_B) / totals["positions"]}

    def loss(
        self, tokens: TokenLoss | None = None, totals: Mapping[str, Any] | None = None
    ) -> jax.Array:
        if self.balance + self.z == 0:
            return jnp.float32(0)
        found = self.losses(totals)
        return self.balance * found["balance"] + self.z * found["z"]

    def totals(self) -> dict[str, jax.Array]:
        return self._sums() if self.balance + self.z > 0 else {}

    def observed(
        self, measured: Mapping[str, Any], updates: jax.Array, tokens: TokenLoss | None = None
    ) -> dict[str, Any]:
        """Returns the bias, moved against the load (arXiv 2408.15664)."""
        if not self.bias:
            return {}
        load_R = jnp.sum(self.picks_BR, axis=0)
        return {"bias": measured["bias"] + self.bias * jnp.sign(jnp.mean(load_R) - load_R)}

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars of one forward pass.

        moe/balance, moe/most_load: the balance loss without its weight, and the largest load of a
          row over the mean one; averaged over layers.
        loss/moe_balance, loss/moe_z: weighted, summed over layers.
        """

        def one(record: Load) -> dict[str, jax.Array]:
            found, load_R = record.losses(), jnp.sum(record.picks_BR, axis=0)
            return {
                "moe/balance": found["balance"],
                "moe/most_load": _share(jnp.max(load_R), jnp.mean(load_R)),
                "loss/moe_balance": record.balance * found["balance"],
                "loss/moe_z": record.z * found["z"],
            }

        each = [jax.vmap(one)(record) for record in records.values()]
        of_A = jax.tree.map(lambda *values: jnp.concatenate(values), *each)
        return {
            name: (jnp.sum if name.startswith("loss/") else jnp.mean)(values_A)
            for name, values_A in of_A.items()
        }

    def _sums(self) -> dict[str, jax.Array]:
        """Returns the picks of each row, and the valid positions: 1e-9 for none."""
        picks_R = jax.lax.stop_gradient(jnp.sum(self.picks_BR, axis=0))
        return {"picks_R": picks_R, "positions": jnp.maximum(jnp.sum(self.positions_B), 1e-9)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("picks_BR", "probability_BR", "z_B", "positions_B", "kth_BE"),
    meta_fields=("balance", "z", "bias"),
)
@dataclass(frozen=True, kw_only=True)
class Thresholds(Load):
    """kth_BE: the score at which each expert would take its share, infinite where none does."""

    kth_BE: jax.Array

    def observed(
        self, measured: Mapping[str, Any], updates: jax.Array, tokens: TokenLoss | None = None
    ) -> dict[str, Any]:
        return {"threshold": running_mean(measured["threshold"], self.kth_BE, updates)}


def _in_parts(count_BL: jax.Array) -> jax.Array:
    parts = jnp.array_split(jnp.sum(count_BL, axis=0), PARTS)
    return jnp.stack([jnp.sum(part) for part in parts]).astype(jnp.float32)


def _share(part: Any, whole: Any) -> Any:
    return part / whole.clip(1)


def _shares(total: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "moe/dropped": _share(total["asked"] - total["taken"], total["asked"]),
        "moe/no_op": _share(total["picks"] - total["asked"], total["picks"]),
        "moe/useful": _share(total["taken"], total["computed"]),
    }
