"""Records of routed layers and of their rules.

Legend: B batch, L positions, A routed layers, G repetitions of a layer.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record, TokenLoss, running_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Record):
    """The positions of a routed layer.

    scores_BL: raw scores. target_BL: the positions that training selects of these inputs.
    wanted_BL, selected_BL: the positions that asked to be processed, and those that were.
    k_B: how many of a row's valid positions the capacity stands for.
    tied_B: whether training's top k ended within rounding of a position left out, see Selection;
      None where training takes no top k.
    """

    scores_BL: jax.Array
    target_BL: jax.Array
    wanted_BL: jax.Array
    selected_BL: jax.Array
    k_B: jax.Array
    tied_B: jax.Array | None

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns `decision_counts`, the positions that were processed ("selected"), near ties."""
        counts = decision_counts(self.wanted_BL, self.target_BL, valid_BL)
        counts["selected"] = jnp.sum(self.selected_BL & valid_BL, axis=-1, dtype=jnp.float32)
        if self.tied_B is not None:
            counts["near_ties"] = self.tied_B.astype(jnp.float32)
        return counts

    @classmethod
    def outcome(cls, counts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns shares of positions, averaged over layers.

        accuracy, precision, recall: of what asked against what training selects; to always answer
          "no" has accuracy 1 - capacity. capacity: processed. overflow: dropped.
        most: the largest share of one sequence that a layer processed.
        near_ties: selections that end in a near tie, summed over layers and sequences.
        """
        each = []
        for of in counts.values():
            total = {name: count_B.sum() for name, count_B in of.items()}
            share_B = of["selected"] / np.maximum(of["positions"], 1)
            overflow = (total["wanted"] - total["selected"]) / total["positions"]
            each.append(
                {name: float(share) for name, share in decision_quality(total).items()}
                | {"capacity": float(total["selected"] / total["positions"])}
                | {"overflow": float(overflow), "most": float(share_B.max())}
            )
        mean = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        ties = [of["near_ties"].sum() for of in counts.values() if "near_ties" in of]
        mean["most"] = max(one["most"] for one in each)
        return mean | ({"near_ties": int(sum(ties))} if ties else {})

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars over the valid positions of one forward pass.

        router/score_mean, score_std: of the raw scores, averaged over routed layers.
        router/position_entropy: entropy of "which position was processed", from the batch's counts,
          averaged over routed layers and divided by log L: 1 where every position is equally often.
        router/chosen_by_all, chosen_by_none: share of positions that every, or no, layer took.
        router/capacity: share of positions that were processed, averaged over routed layers.
        router/overflow: share of positions that were dropped.
        router/underload: capacity that was left unused, as a share of positions.
        """
        scores_ABL, selected_ABL, wanted_ABL, k_AB = (
            jnp.concatenate([getattr(record, name) for record in records.values()])
            for name in ("scores_BL", "selected_BL", "wanted_BL", "k_B")
        )
        count = jnp.sum(valid_BL).astype(jnp.float32)
        masked_ABL = jnp.where(valid_BL[None], scores_ABL, 0.0)
        mean_A = jnp.sum(masked_ABL, axis=(1, 2)) / count
        centred_ABL = jnp.where(valid_BL[None], scores_ABL - mean_A[:, None, None], 0.0)
        std_A = jnp.sqrt(jnp.sum(jnp.square(centred_ABL), axis=(1, 2)) / count)
        chosen_AL = jnp.sum(selected_ABL, axis=1).astype(jnp.float32)
        share_AL = chosen_AL / jnp.maximum(jnp.sum(chosen_AL, axis=1, keepdims=True), 1.0)
        entropy_A = -jnp.sum(jax.scipy.special.xlogy(share_AL, share_AL), axis=1)
        unused_AB = k_AB - jnp.sum(selected_ABL, axis=2)
        positions = count * chosen_AL.shape[0]
        every_BL = jnp.all(selected_ABL, axis=0) & valid_BL
        none_BL = ~jnp.any(selected_ABL, axis=0) & valid_BL
        dropped = jnp.sum(wanted_ABL & ~selected_ABL).astype(jnp.float32)
        return {
            "router/score_mean": jnp.mean(mean_A),
            "router/score_std": jnp.mean(std_A),
            "router/position_entropy": jnp.mean(entropy_A / math.log(scores_ABL.shape[-1])),
            "router/chosen_by_all": jnp.sum(every_BL).astype(jnp.float32) / count,
            "router/chosen_by_none": jnp.sum(none_BL).astype(jnp.float32) / count,
            "router/capacity": jnp.sum(chosen_AL) / positions,
            "router/overflow": dropped / positions,
            "router/underload": jnp.sum(jnp.maximum(unused_AB, 0)).astype(jnp.float32) / positions,
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Balanced(Record):
    """Weighted losses of a rule by name, each (B,)."""

    losses: dict[str, jax.Array]

    def loss(
        self, tokens: TokenLoss | None = None, totals: Mapping[str, Any] | None = None
    ) -> jax.Array:
        return sum((jnp.mean(loss_B) for loss_B in self.losses.values()), jnp.float32(0))

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns each loss, as loss/NAME, summed over layers."""
        names = sorted({name for record in records.values() for name in record.losses})
        return {
            f"loss/{name}": _summed(r.losses[name] for r in records.values() if name in r.losses)
            for name in names
        }


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits_BL", "target_BL", "loss_B"),
    meta_fields=("name",),
)
@dataclass(frozen=True)
class Taught(Record):
    """Logits that learn to be above 0 where training selects a position.

    loss_B: the weighted loss. name: the way to select that is taught.
    """

    logits_BL: jax.Array
    target_BL: jax.Array
    loss_B: jax.Array
    name: str

    def loss(
        self, tokens: TokenLoss | None = None, totals: Mapping[str, Any] | None = None
    ) -> jax.Array:
        return jnp.mean(self.loss_B)

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns how well the logits predict the selection, and their loss.

        NAME/accuracy, precision, recall, capacity: averaged over layers, and for each as
          NAME/accuracy/LAYER, where LAYER is its place and its repetition, as in 1_mod.0.
        loss/NAME: summed over layers.
        """
        found: dict[str, jax.Array] = {}
        for method in dict.fromkeys(record.name for record in records.values()):
            mine = {path: r for path, r in records.items() if r.name == method}
            found[f"loss/{method}"] = _summed(r.loss_B for r in mine.values())
            each: dict[str, dict[str, jax.Array]] = {}
            for path, record in mine.items():
                counts = decision_counts(record.logits_BL > 0, record.target_BL, valid_BL[None])
                shares = decision_quality({k: jnp.sum(n, axis=1) for k, n in counts.items()})
                layer = path.rpartition("/")[0]
                for share, value_G in shares.items():
                    of = each.setdefault(share, {})
                    of |= {f"{layer}.{g}": value for g, value in enumerate(value_G)}
            for share, of in each.items():
                found[f"{method}/{share}"] = jnp.mean(jnp.stack(list(of.values())))
                found |= {f"{method}/{share}/{layer}": value for layer, value in of.items()}
        return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ranked(Record):
    """kth_B: the k-th best rank of each row, infinite for a row of padding.

    taught: the record of scores that learn to select by themselves, None where they do not.
    """

    kth_B: jax.Array
    taught: Taught | None

    def loss(
        self, tokens: TokenLoss | None = None, totals: Mapping[str, Any] | None = None
    ) -> jax.Array:
        return jnp.float32(0) if self.taught is None else self.taught.loss()

    def observed(
        self, measured: Mapping[str, Any], updates: jax.Array, tokens: TokenLoss | None = None
    ) -> dict[str, Any]:
        """Returns the threshold, moved towards the batch's mean k-th score."""
        return {"threshold": running_mean(measured["threshold"], self.kth_B[:, None], updates)}

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        taught = {name: r.taught for name, r in records.items() if r.taught is not None}
        return Taught.statistics(taught, valid_BL)


def _summed(losses: Any) -> jax.Array:
    """Returns the sum over layers and repetitions of the means over sequences of losses (G, B)."""
    return sum((jnp.sum(jnp.mean(loss_GB, axis=1)) for loss_GB in losses), jnp.float32(0))


def cross_entropy(
    logits_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array | None
) -> jax.Array:
    """Returns each row's mean binary cross-entropy over valid positions, (B,)."""
    sign_BL = jnp.where(target_BL, 1.0, -1.0)
    return masked_mean(jax.nn.softplus(-sign_BL * logits_BL), valid_BL)


def masked_mean(x_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Returns the mean over each row's valid positions, (B,); 0 where there is none."""
    if valid_BL is None:
        return jnp.mean(x_BL, axis=1)
    total_B = jnp.sum(jnp.where(valid_BL, x_BL, 0.0), axis=1)
    return total_B / jnp.maximum(jnp.sum(valid_BL, axis=1), 1).astype(jnp.float32)


def decision_counts(
    wanted_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """Returns counts of the valid positions of every sequence, (..., B).

    wanted, target: by a causal rule and by training. both: by both. agreed: by both or neither.
    positions: all.
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


def decision_quality(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shares, elementwise, of those counts; capacity is the share that is wanted."""

    def share(part, whole):
        return counts[part] / counts[whole].clip(1)

    return {
        "accuracy": share("agreed", "positions"),
        "precision": share("both", "wanted"),
        "recall": share("both", "target"),
        "capacity": share("wanted", "positions"),
    }
