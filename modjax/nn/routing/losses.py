"""Losses of rules: balance, z and cross-entropy, and the records that carry them.

Legend: B batch, L positions, R scores of a position, E experts, A layers of one kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from modjax.nn.call import At
from modjax.nn.records import Record
from modjax.nn.routing.routing_records import decision_shares, decisions, share
from modjax.nn.routing.selection import Selection, selected_mask
from modjax.nn.routing.thresholds import moved


def path_losses(
    log_odds_BL: jax.Array, logits_BLR: jax.Array, valid_BL: jax.Array | None, capacity: float
) -> dict[str, jax.Array]:
    """Returns the losses of a choice between a layer and skipping it, by name, each (B,).

    log_odds_BL: log-odds of the layer. logits_BLR: logits of both paths, to skip and the layer.

    balance: sum_i f_i P_i / t_i over both paths, Eq. 4 of arXiv 2101.03961 for unequal targets. f_i
      is the share of positions that choose path i, P_i its mean probability, and t_i its target:
      1 - capacity to skip, capacity for the layer. The loss is 1 for f = P = t.
    z: the mean of logsumexp(logits)^2 (arXiv 2202.08906, Eq. 5).
    """
    share_B = masked_mean((log_odds_BL > 0).astype(jnp.float32), valid_BL)
    probability_B = masked_mean(jax.nn.sigmoid(log_odds_BL), valid_BL)
    balance_B = jnp.ones_like(share_B)  # at capacity 1 there is nothing to balance
    if capacity < 1:
        skipped_B = (1 - share_B) * (1 - probability_B) / (1 - capacity)
        balance_B = skipped_B + share_B * probability_B / capacity
    return {"balance": balance_B, "z": masked_mean(squared_logsumexp(logits_BLR), valid_BL)}


def row_balance(picks_R: jax.Array, mean_R: jax.Array) -> jax.Array:
    """Returns the balance loss of a router's R outputs, R sum_r f_r P_r (arXiv 2101.03961, Eq. 4).

    f_r is output r's share of the picks, and P = mean_R its mean probability. The loss is 1 for an
    even load, and R if one output gets all picks.
    """
    share_R = picks_R / jnp.maximum(jnp.sum(picks_R), 1e-9)
    return picks_R.shape[0] * jnp.sum(share_R * mean_R)


def squared_logsumexp(logits: jax.Array) -> jax.Array:
    """Returns logsumexp(logits)^2 over the last dim. The z-loss is its mean."""
    return jnp.square(jax.nn.logsumexp(logits, axis=-1))


def masked_mean(x_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Returns the mean over each row's valid positions, (B,); 0 for a row without any."""
    if valid_BL is None:
        return jnp.mean(x_BL, axis=1)
    total_B = jnp.sum(jnp.where(valid_BL, x_BL, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(valid_BL, axis=1), 1).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RuleRecord(Record):
    """Losses of a rule of positions, and the numbers that its threshold averages.

    losses: weighted losses by name, each (B,).
    logits_BL: logits trained to be above 0 exactly at target_BL; `losses` then has one entry.
    target_BL: the positions that training selects.
    kth_B: the k-th highest ranking score of each row, infinite for a row of padding.
    A rule without the last three leaves them None.
    """

    losses: dict[str, jax.Array]
    logits_BL: jax.Array | None = None
    target_BL: jax.Array | None = None
    kth_B: jax.Array | None = None

    def loss(self, tokens=None, totals=None):
        return sum((jnp.mean(loss_B) for loss_B in self.losses.values()), jnp.float32(0))

    def observed(self, measured, updates, tokens=None):
        return moved(measured, None if self.kth_B is None else self.kth_B[:, None], updates)

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns the losses, and how well the logits predict the selection.

        loss/NAME: summed over layers.
        NAME/accuracy, precision, recall, capacity: averaged over layers.
        NAME/accuracy/LAYER, ...: of one layer. LAYER is its path and repetition, as in 1_mod.0.
        """
        found: dict[str, Any] = {}
        means: dict[str, list[jax.Array]] = {}
        for path, record in records.items():
            layer = path.rpartition("/")[0]
            for name, loss_AB in record.losses.items():
                loss = jnp.sum(jnp.mean(loss_AB, axis=1))
                found[f"loss/{name}"] = found.get(f"loss/{name}", 0.0) + loss
            if record.logits_BL is None:
                continue
            (name,) = record.losses
            counts = decisions(record.logits_BL > 0, record.target_BL, valid_BL[None])
            shares = decision_shares({key: jnp.sum(n_AB, axis=1) for key, n_AB in counts.items()})
            for key, value_A in shares.items():
                means.setdefault(f"{name}/{key}", []).append(value_A)
                found |= {f"{name}/{key}/{layer}.{g}": value for g, value in enumerate(value_A)}
        return found | {name: jnp.mean(jnp.concatenate(each)) for name, each in means.items()}


def selection_loss(
    name: str, weight: float, logits_BL: jax.Array, selection: Selection, at: At
) -> RuleRecord:
    """Returns a record of the cross-entropy between logits and the selection of training.

    The loss teaches the logits to be above 0 exactly at the selected positions.
    """
    target_BL = selected_mask(selection, logits_BL.shape[1])
    sign_BL = jnp.where(target_BL, 1.0, -1.0)
    loss_B = weight * masked_mean(jax.nn.softplus(-sign_BL * logits_BL), at.valid_BL)
    return RuleRecord({name: loss_B}, logits_BL, target_BL)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterLoad(Record):
    """Load of each output of a router, an expert or a no-op, by which experts are balanced.

    picks_BR: picks of each output, before any is dropped.
    probability_BR: probabilities, summed over positions. z_B: sums of logsumexp(logits)^2.
    positions_B: number of valid positions.
    kth_BE: each expert's k-th best score, k being an even share of the picks; infinite for a row
      of padding. None without thresholds.
    balance, z: weights of the two losses.
    bias: step of the bias that balances the load, per update; 0 without one.
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
        """Returns the unweighted balance loss and z-loss (arXiv 2202.08906, Eq. 5).

        totals: as `totals` returns them, of the whole batch; None means the record's own.
        """
        totals = totals or self._sums()
        mean_R = jnp.sum(self.probability_BR, axis=0) / totals["positions"]
        z = jnp.sum(self.z_B) / totals["positions"]
        return {"balance": row_balance(totals["picks_R"], mean_R), "z": z}

    def loss(self, tokens=None, totals=None):
        if self.balance + self.z == 0:
            return jnp.float32(0)
        found = self.losses(totals)
        return self.balance * found["balance"] + self.z * found["z"]

    def totals(self):
        return self._sums() if self.balance + self.z > 0 else {}

    def observed(self, measured, updates, tokens=None):
        """Returns the new bias, moved against the load (arXiv 2408.15664), and new thresholds."""
        found = moved(measured, self.kth_BE, updates)
        if self.bias:
            load_R = jnp.sum(self.picks_BR, axis=0)
            moved_R = self.bias * jnp.sign(jnp.mean(load_R) - load_R)
            found["bias"] = measured["bias"] + moved_R
        return found

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars of one forward pass.

        moe/balance: the unweighted balance loss, averaged over layers.
        moe/most_load: the largest load of an output over the mean load, averaged over layers.
        loss/moe_balance, loss/moe_z: weighted losses, summed over layers.
        """

        def one(record: RouterLoad) -> dict[str, jax.Array]:
            found, load_R = record.losses(), jnp.sum(record.picks_BR, axis=0)
            return {
                "moe/balance": found["balance"],
                "moe/most_load": share(jnp.max(load_R), jnp.mean(load_R)),
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
        """Returns the picks of each output, and the number of valid positions, at least 1e-9."""
        picks_R = jax.lax.stop_gradient(jnp.sum(self.picks_BR, axis=0))
        return {"picks_R": picks_R, "positions": jnp.maximum(jnp.sum(self.positions_B), 1e-9)}
