"""What a mixture of experts reports: its losses, its load, and what became of the picks.

Legend: B batch, S positions, R rows of the router, E experts, G repetitions of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record, running_mean
from modjax.spec import MoE

PARTS = 4  # of a sequence, for where its picks are dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing(Record):
    """What the router made of the valid positions of each sequence, and what became of it.

    asked_BS, taken_BS: picks of experts, and those of them that were computed, of each position.
    valid_BS: positions that count. experts_BSK: what each picked, E for none.
    picks_BR: picks of each row, before any is dropped.
    probability_BR: sums of the router's probabilities; z_B: of logsumexp(logits)^2.
    computed_B: positions that the experts computed, empty slots among them. kth_BE: the score that
      ranks as many positions as an expert should take, infinite where there are fewer; None, no
      threshold is measured.
    spec: the layer's, for its weights of losses. tied_BE: whether an expert's best positions end
      within rounding of one left out, see Selection; None, experts choose no best.
    """

    asked_BS: jax.Array
    taken_BS: jax.Array
    valid_BS: jax.Array
    experts_BSK: jax.Array
    picks_BR: jax.Array
    probability_BR: jax.Array
    z_B: jax.Array
    computed_B: jax.Array
    kth_BE: jax.Array | None
    spec: MoE = field(metadata={"static": True})
    tied_BE: jax.Array | None = None

    def balance(self, totals: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """Returns R sum_r f_r P_r (arXiv 2101.03961, Eq. 4): 1 where rows are alike, R at collapse.

        f: share of the batch's picks, without gradient, before any is dropped; P: mean probability.
        totals: of the batch that this record is a part of, see `losses`; None, of its own.
        """
        totals = totals or self._sums()
        picks_R = totals["picks_R"]
        share_R = picks_R / jnp.maximum(jnp.sum(picks_R), 1e-9)
        mean_R = jnp.sum(self.probability_BR, axis=0) / totals["positions"]
        return picks_R.shape[0] * jnp.sum(share_R * mean_R)

    def z(self, totals: Mapping[str, jax.Array] | None = None) -> jax.Array:
        """Returns the mean of logsumexp(logits)^2 (arXiv 2202.08906, Eq. 5)."""
        return jnp.sum(self.z_B) / (totals or self._sums())["positions"]

    def loss(
        self, nll_BL: jax.Array | None = None, totals: Mapping[str, jax.Array] | None = None
    ) -> jax.Array:
        return sum(self._losses(totals).values(), jnp.float32(0))

    def totals(self) -> dict[str, jax.Array]:
        return self._sums() if self.spec.balanced else {}

    def observed(self, measured: Mapping[str, Any], updates: jax.Array) -> dict[str, Any]:
        """The bias, moved against the load (arXiv 2408.15664), and the thresholds."""
        found: dict[str, Any] = {}
        if self.spec.bias_rate:
            load_R = jnp.sum(self.picks_BR, axis=0)
            found["bias"] = measured["bias"] + self.spec.bias_rate * jnp.sign(
                jnp.mean(load_R) - load_R
            )
        if self.kth_BE is not None:
            found["threshold"] = running_mean(measured["threshold"], self.kth_BE, updates)
        return found

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns counts of every sequence.

        picks: of the router. asked: picks of experts. taken: picks computed. computed: positions
        that the experts computed. near_ties: experts whose choice ends in a near tie.
        """
        counts = {
            "picks": jnp.sum(self.picks_BR, axis=1),
            "asked": jnp.sum(self.asked_BS, axis=1).astype(jnp.float32),
            "taken": jnp.sum(self.taken_BS, axis=1).astype(jnp.float32),
            "computed": self.computed_B,
        }
        if self.tied_BE is not None:
            counts["near_ties"] = jnp.sum(self.tied_BE, axis=1).astype(jnp.float32)
        return counts

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Scalars of one forward pass.

        moe/dropped: share of the experts' picks that found no slot; moe/dropped/N of 4: in that
          part of the sequences. moe/no_op: share of the picks that are of no expert.
        moe/useful: of what the experts computed, the share that was picked.
        moe/idle: share of positions that no expert computed.
        moe/balance, moe/most_load: the unweighted balance loss, and the largest load of a row of
          the router over the mean one; averaged over layers.
        loss/moe_balance, loss/moe_z: weighted, summed over layers.
        """
        each = [jax.vmap(lambda record: record._scalars())(record) for record in records.values()]
        names = {name for one in each for name in one}
        of_A = {n: jnp.concatenate([one[n] for one in each if n in one]) for n in sorted(names)}
        total = {name: jnp.sum(values_A, axis=0) for name, values_A in of_A.items()}
        dropped_P = _share(total["asked_P"] - total["taken_P"], total["asked_P"])
        return {
            **{f"moe/{name}": value for name, value in _shares(total).items()},
            **{f"moe/dropped/{p + 1} of {PARTS}": dropped_P[p] for p in range(PARTS)},
            "moe/idle": _share(total["idle"], total["positions"]),
            "moe/balance": jnp.mean(of_A["balance"]),
            "moe/most_load": jnp.mean(of_A["most_load"]),
            **{name: value for name, value in total.items() if name.startswith("loss/")},
        }

    def _scalars(self) -> dict[str, jax.Array]:
        counts = {name: jnp.sum(count_B) for name, count_B in self.counts(self.valid_BS).items()}
        load_R = jnp.sum(self.picks_BR, axis=0)
        return counts | {
            "asked_P": _in_parts(self.asked_BS),
            "taken_P": _in_parts(self.taken_BS),
            "idle": jnp.sum(self.valid_BS & (self.taken_BS == 0)).astype(jnp.float32),
            "positions": jnp.sum(self.valid_BS).astype(jnp.float32),
            "balance": self.balance(),
            "most_load": _share(jnp.max(load_R), jnp.mean(load_R)),
            **self._losses(),
        }

    def _losses(self, totals: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        if self.spec.router != "token_choice":
            return {}
        return {
            "loss/moe_balance": self.spec.balance_weight * self.balance(totals),
            "loss/moe_z": self.spec.z_weight * self.z(totals),
        }

    def _sums(self) -> dict[str, jax.Array]:
        """Returns the picks of each row, and the valid positions: 1e-9 for none."""
        picks_R = jax.lax.stop_gradient(jnp.sum(self.picks_BR, axis=0))
        positions = jnp.sum(self.valid_BS).astype(jnp.float32)
        return {"picks_R": picks_R, "positions": jnp.maximum(positions, 1e-9)}


def _in_parts(count_BS: jax.Array) -> jax.Array:
    parts = jnp.array_split(jnp.sum(count_BS, axis=0), PARTS)
    return jnp.stack([jnp.sum(part) for part in parts]).astype(jnp.float32)


def _share(part: Any, whole: Any) -> Any:
    return part / whole.clip(1)


def _shares(total: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dropped": _share(total["asked"] - total["taken"], total["asked"]),
        "no_op": _share(total["picks"] - total["asked"], total["picks"]),
        "useful": _share(total["taken"], total["computed"]),
    }


def shares(
    counts: Mapping[str, Mapping[str, np.ndarray]], weight_B: np.ndarray
) -> dict[str, float]:
    """dropped, no_op and useful, as `Routing.statistics` has them; {} without experts.

    counts: of layers' records, for every sequence, (B, G). Sequences of weight 0 are padding.
    """
    mine = [of for of in counts.values() if "taken" in of]
    if not mine:
        return {}
    names = ("picks", "asked", "taken", "computed")
    total = {name: sum(of[name][weight_B > 0].sum() for of in mine) for name in names}
    return {name: float(value) for name, value in _shares(total).items()}
