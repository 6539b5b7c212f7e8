"""Records of a mixture of experts and of its rules.

Legend: B batch, L positions, P picks of a position, R scores of a position, E experts, A layers of
one kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from modjax.nn.records import Record, running_mean

PARTS = 4  # of a sequence, in which dropped picks are reported


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing(Record):
    """The picks of each sequence, of its valid positions.

    asked_BL, taken_BL: picks of experts, and those that were computed.
    valid_BL: positions that count. experts_BLP: the experts that each picked, E for none.
    picks_B: picks of the router, including no-ops.
    computed_B: positions that the experts computed, including empty slots.
    tied_BE: whether an expert's best positions end in a near tie; None where no expert chooses.
    """

    asked_BL: jax.Array
    taken_BL: jax.Array
    valid_BL: jax.Array
    experts_BLP: jax.Array
    picks_B: jax.Array
    computed_B: jax.Array
    tied_BE: jax.Array | None = None

    def counts(self, valid_BL):
        """Returns counts of every sequence; near_ties: experts whose choice ends in a near tie."""
        counts = {
            "picks": self.picks_B,
            "asked": jnp.sum(self.asked_BL, axis=1),
            "taken": jnp.sum(self.taken_BL, axis=1),
            "computed": self.computed_B,
        }
        ties = {} if self.tied_BE is None else {"near_ties": jnp.sum(self.tied_BE, axis=1)}
        return counts | ties

    @classmethod
    def outcome(cls, counts):
        """Returns moe/dropped, no_op and useful, see `statistics`, and the sum of near ties."""
        names = ("picks", "asked", "taken", "computed")
        found = _shares(*(sum(of[name].sum() for of in counts.values()) for name in names))
        ties = [of["near_ties"].sum() for of in counts.values() if "near_ties" in of]
        shares = {name: float(value) for name, value in found.items()}
        return shares | ({"moe/near_ties": int(sum(ties))} if ties else {})

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars of one forward pass.

        moe/dropped: share of the experts' picks that found no slot; moe/dropped/N of 4: in that
          part of the sequences. moe/no_op: share of the picks that are of no expert.
        moe/useful: of the positions that the experts computed, the share that was picked.
        moe/idle: share of positions that no expert computed.
        """
        asked_ABL, taken_ABL, valid_ABL, picks_AB, computed_AB = (
            jnp.concatenate([getattr(record, name) for record in records.values()])
            for name in ("asked_BL", "taken_BL", "valid_BL", "picks_B", "computed_B")
        )
        found = _shares(*map(jnp.sum, (picks_AB, asked_ABL, taken_ABL, computed_AB)))
        parts = (jnp.array_split(count_ABL, PARTS, axis=2) for count_ABL in (asked_ABL, taken_ABL))
        for part, (asked, taken) in enumerate(zip(*parts, strict=True), 1):
            dropped = _share(jnp.sum(asked - taken), jnp.sum(asked))
            found[f"moe/dropped/{part} of {PARTS}"] = dropped
        idle_ABL = valid_ABL & (taken_ABL == 0)
        return found | {"moe/idle": _share(jnp.sum(idle_ABL), jnp.sum(valid_ABL))}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterLoad(Record):
    """How evenly the rows of a router are used.

    picks_BR: picks of each row, before any is dropped. probability_BR: sums of the probabilities.
    z_B: sums of logsumexp(logits)^2. positions_B: valid positions.
    kth_BE: the score at which each expert would take its share, infinite where none does; None
      without thresholds.
    balance, z: weights of the two losses. bias: the rate of a bias that is moved against the load.
    """

    picks_BR: jax.Array
    probability_BR: jax.Array
    z_B: jax.Array
    positions_B: jax.Array
    kth_BE: jax.Array | None = None
    balance: float = field(default=0.0, metadata={"static": True})
    z: float = field(default=0.0, metadata={"static": True})
    bias: float = field(default=0.0, metadata={"static": True})

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

    def loss(self, tokens=None, totals=None):
        if self.balance + self.z == 0:
            return jnp.float32(0)
        found = self.losses(totals)
        return self.balance * found["balance"] + self.z * found["z"]

    def totals(self):
        return self._sums() if self.balance + self.z > 0 else {}

    def observed(self, measured, updates, tokens=None):
        """Returns the bias, moved against the load (arXiv 2408.15664), or the thresholds."""
        found = {}
        if self.bias:
            load_R = jnp.sum(self.picks_BR, axis=0)
            moved_R = self.bias * jnp.sign(jnp.mean(load_R) - load_R)
            found["bias"] = measured["bias"] + moved_R
        if self.kth_BE is not None:
            found["threshold"] = running_mean(measured["threshold"], self.kth_BE, updates)
        return found

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars of one forward pass.

        moe/balance, moe/most_load: the balance loss without its weight, and the largest load of a
          row over the mean one; averaged over layers.
        loss/moe_balance, loss/moe_z: weighted, summed over layers.
        """

        def one(record: RouterLoad) -> dict[str, jax.Array]:
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


def _share(part: Any, whole: Any) -> Any:
    return part / whole.clip(1)


def _shares(picks: Any, asked: Any, taken: Any, computed: Any) -> dict[str, Any]:
    """Returns shares of totals, see Routing.counts."""
    return {
        "moe/dropped": _share(asked - taken, asked),
        "moe/no_op": _share(picks - asked, picks),
        "moe/useful": _share(taken, computed),
    }
