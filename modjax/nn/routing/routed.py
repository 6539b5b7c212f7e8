"""Records of routed layers and of their rules.

Legend: B batch, L positions, A layers of one kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record, running_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Record):
    """The positions of a routed layer.

    scores_BL: raw scores. target_BL: the positions that training selects.
    wanted_BL, selected_BL: the positions that were requested, and those that were processed.
    k_B: the capacity of each row, in positions.
    tied_B: whether training's top k ended in a near tie, see Selection; None without a top k.
    """

    scores_BL: jax.Array
    target_BL: jax.Array
    wanted_BL: jax.Array
    selected_BL: jax.Array
    k_B: jax.Array
    tied_B: jax.Array | None

    def counts(self, valid_BL):
        """Returns `_decisions`, the positions that were processed ("selected"), near ties."""
        counts = _decisions(self.wanted_BL, self.target_BL, valid_BL)
        counts["selected"] = jnp.sum(self.selected_BL & valid_BL, axis=-1, dtype=jnp.float32)
        ties = {} if self.tied_B is None else {"near_ties": self.tied_B.astype(jnp.float32)}
        return counts | ties

    @classmethod
    def outcome(cls, counts):
        """Returns shares of positions, averaged over layers.

        accuracy, precision, recall: of requests against the selection of training; to request
          nothing has accuracy 1 - capacity. capacity: processed. overflow: dropped.
        most: the largest share of one sequence that a layer processed.
        near_ties: selections that end in a near tie, summed over layers and sequences.
        """
        each = []
        for of in counts.values():
            total = {name: count_B.sum() for name, count_B in of.items()}
            shares = _shares(total)
            shares["capacity"] = total["selected"] / total["positions"]
            shares["overflow"] = (total["wanted"] - total["selected"]) / total["positions"]
            shares["most"] = np.max(of["selected"] / np.maximum(of["positions"], 1))
            each.append(shares)
        found = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        found["most"] = float(max(one["most"] for one in each))
        ties = [of["near_ties"].sum() for of in counts.values() if "near_ties" in of]
        return found | ({"near_ties": int(sum(ties))} if ties else {})

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars over the valid positions of one forward pass.

        router/score_mean, score_std: of the raw scores, averaged over layers.
        router/position_entropy: entropy of "which position was processed", from the batch's counts,
          averaged over layers and divided by log L: 1 where every position is equally often.
        router/chosen_by_all, chosen_by_none: share of positions that every, or no, layer processed.
        router/capacity, overflow: shares of positions that were processed, and that were dropped.
        router/underload: capacity that was left unused, as a share of positions.
        """
        scores_ABL, selected_ABL, wanted_ABL, k_AB = (
            jnp.concatenate([getattr(record, name) for record in records.values()])
            for name in ("scores_BL", "selected_BL", "wanted_BL", "k_B")
        )
        count = jnp.sum(valid_BL).astype(jnp.float32)
        positions = count * len(k_AB)

        def share(number: jax.Array, whole: jax.Array) -> jax.Array:
            return jnp.sum(number).astype(jnp.float32) / whole

        masked_ABL = jnp.where(valid_BL[None], scores_ABL, 0.0)
        mean_A = jnp.sum(masked_ABL, axis=(1, 2)) / count
        centred_ABL = jnp.where(valid_BL[None], scores_ABL - mean_A[:, None, None], 0.0)
        std_A = jnp.sqrt(jnp.sum(jnp.square(centred_ABL), axis=(1, 2)) / count)
        chosen_AL = jnp.sum(selected_ABL, axis=1).astype(jnp.float32)
        share_AL = chosen_AL / jnp.maximum(jnp.sum(chosen_AL, axis=1, keepdims=True), 1.0)
        entropy_A = -jnp.sum(jax.scipy.special.xlogy(share_AL, share_AL), axis=1)
        unused_AB = k_AB - jnp.sum(selected_ABL, axis=2)
        return {
            "router/score_mean": jnp.mean(mean_A),
            "router/score_std": jnp.mean(std_A),
            "router/position_entropy": jnp.mean(entropy_A / math.log(scores_ABL.shape[-1])),
            "router/chosen_by_all": share(jnp.all(selected_ABL, axis=0) & valid_BL, count),
            "router/chosen_by_none": share(~jnp.any(selected_ABL, axis=0) & valid_BL, count),
            "router/capacity": share(selected_ABL, positions),
            "router/overflow": share(wanted_ABL & ~selected_ABL, positions),
            "router/underload": share(jnp.maximum(unused_AB, 0), positions),
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learnt(Record):
    """The losses of a rule, and the numbers that it measures.

    losses: weighted losses by name, each (B,).
    logits_BL: logits that learn, by the one loss, to be above 0 where training selects, target_BL.
    kth_B: the k-th best rank of each row, infinite for a row of padding.
    The last three are None where the rule has none.
    """

    losses: dict[str, jax.Array]
    logits_BL: jax.Array | None = None
    target_BL: jax.Array | None = None
    kth_B: jax.Array | None = None

    def loss(self, tokens=None, totals=None):
        return sum((jnp.mean(loss_B) for loss_B in self.losses.values()), jnp.float32(0))

    def observed(self, measured, updates, tokens=None):
        """Returns the threshold, moved towards the batch's mean k-th score."""
        if self.kth_B is None:
            return {}
        return {"threshold": running_mean(measured["threshold"], self.kth_B[:, None], updates)}

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns the losses, and how well the logits predict the selection.

        loss/NAME: summed over layers.
        NAME/accuracy, precision, recall, capacity: averaged over layers, and for each as
          NAME/accuracy/LAYER, where LAYER is its place and its repetition, as in 1_mod.0.
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
            counts = _decisions(record.logits_BL > 0, record.target_BL, valid_BL[None])
            shares = _shares({key: jnp.sum(n_AB, axis=1) for key, n_AB in counts.items()})
            for share, value_A in shares.items():
                means.setdefault(f"{name}/{share}", []).append(value_A)
                for g, value in enumerate(value_A):
                    found[f"{name}/{share}/{layer}.{g}"] = value
        return found | {name: jnp.mean(jnp.concatenate(each)) for name, each in means.items()}


def _decisions(
    wanted_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """Returns counts of the valid positions of every sequence, (..., B).

    wanted, target: requested by a causal rule, and selected by training. both: both. agreed: both
    or neither. positions: all.
    """
    masks = {
        "wanted": wanted_BL,
        "target": target_BL,
        "both": wanted_BL & target_BL,
        "agreed": wanted_BL == target_BL,
        "positions": jnp.ones_like(wanted_BL),
    }
    return {
        name: jnp.sum(mask_BL & valid_BL, axis=-1, dtype=jnp.float32)
        for name, mask_BL in masks.items()
    }


def _shares(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shares of those counts, elementwise; capacity is the share that is requested."""
    parts = {
        "accuracy": ("agreed", "positions"),
        "precision": ("both", "wanted"),
        "recall": ("both", "target"),
        "capacity": ("wanted", "positions"),
    }
    return {name: counts[part] / counts[whole].clip(1) for name, (part, whole) in parts.items()}
