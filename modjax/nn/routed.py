"""What a routed layer reports, and everything that is read from it.

Legend: B batch, L positions, A routed layers, G repetitions of a layer.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record, running_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Record):
    """What a router made of the positions, and what became of them.

    scores_BL: the raw router scores. target_BL: what training selects of these inputs.
    wanted_BL, selected_BL: what the routing chose, and the part of it that was processed.
    predictor_BL: logits of the predictor, where there is one. auxiliary_BL: the scores, where the
      auxiliary loss teaches them to select.
    k_B, kth_B: the number of a row's valid positions that the capacity stands for, and the k-th
      best rank, infinite where a row has none.
    losses: name -> (B,), weighted.
    tied_B: whether training's top k ended within rounding of a position left out, see Selection;
      None, training has a rule of its own.
    """

    scores_BL: jax.Array
    target_BL: jax.Array
    wanted_BL: jax.Array
    selected_BL: jax.Array
    predictor_BL: jax.Array | None
    auxiliary_BL: jax.Array | None
    k_B: jax.Array
    kth_B: jax.Array
    losses: dict[str, jax.Array]
    tied_B: jax.Array | None = None

    def loss(self, nll_BL: jax.Array | None = None) -> jax.Array:
        """The sum of the means of its losses, to be added to the objective."""
        return sum((jnp.mean(loss_B) for loss_B in self.losses.values()), jnp.float32(0))

    def observed(self, measured: Mapping[str, Any], updates: jax.Array) -> dict[str, Any]:
        """The threshold, moved towards the batch's mean k-th score."""
        return {"threshold": running_mean(measured["threshold"], self.kth_B[:, None], updates)}

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns decision_counts', selected (processed) and near_ties, of every sequence."""
        counts = decision_counts(self.wanted_BL, self.target_BL, valid_BL)
        selected_BL = self.selected_BL & valid_BL
        counts["selected"] = jnp.sum(selected_BL, axis=-1, dtype=jnp.float32)
        if self.tied_B is not None:
            counts["near_ties"] = self.tied_B.astype(jnp.float32)
        return counts

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Scalars over the valid positions of one forward pass.

        router/score_mean, score_std: of the raw scores, averaged over routed layers.
        router/position_entropy: entropy of "which position was processed", from the batch's counts,
          averaged over routed layers and divided by log L: 1 where every position is equally often.
        router/chosen_by_all, chosen_by_none: share of positions that every, or no, layer took.
        router/capacity: share of positions that were processed, averaged over routed layers.
        router/overflow: share of positions that asked to be processed and found no room.
        router/underload: capacity that was left unused, as a share of positions.
        loss/NAME: weighted losses of the routers, summed over routed layers.
        METHOD/accuracy, precision, recall, capacity: of the ways that were taught to select without
          the future, against what training selects; averaged, and per layer as
          METHOD/accuracy/LAYER, where LAYER is its place in the pattern and its repetition, as in
          1_mod.0.
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
        missed = jnp.sum(wanted_ABL & ~selected_ABL).astype(jnp.float32)
        statistics = {
            "router/score_mean": jnp.mean(mean_A),
            "router/score_std": jnp.mean(std_A),
            "router/position_entropy": jnp.mean(entropy_A / math.log(scores_ABL.shape[-1])),
            "router/chosen_by_all": jnp.sum(every_BL).astype(jnp.float32) / count,
            "router/chosen_by_none": jnp.sum(none_BL).astype(jnp.float32) / count,
            "router/capacity": jnp.sum(chosen_AL) / positions,
            "router/overflow": missed / positions,
            "router/underload": jnp.sum(jnp.maximum(unused_AB, 0)).astype(jnp.float32) / positions,
        }
        for name in sorted({name for record in records.values() for name in record.losses}):
            losses = (r.losses[name] for r in records.values() if name in r.losses)
            total = sum(jnp.sum(jnp.mean(loss_GB, axis=1)) for loss_GB in losses)
            statistics[f"loss/{name}"] = jnp.asarray(total)
        for method in ("predictor", "auxiliary"):
            logits = {name: getattr(r, f"{method}_BL") for name, r in records.items()}
            statistics |= _foresight(method, logits, records, valid_BL)
        return statistics


def _foresight(
    method: str, logits: Mapping[str, Any], records: Mapping[str, Routed], valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """How well `logits` > 0 foretell the training selection, where there are any."""
    measured = {}
    for name, logits_GBL in logits.items():
        if logits_GBL is not None:
            counts = decision_counts(logits_GBL > 0, records[name].target_BL, valid_BL[None])
            measured[name] = decision_quality(
                {key: jnp.sum(count_GB, axis=1) for key, count_GB in counts.items()}
            )
    statistics = {}
    for quantity in next(iter(measured.values()), ()):
        per_layer = {
            f"{name}.{g}": value
            for name, quality in measured.items()
            for g, value in enumerate(quality[quantity])
        }
        statistics[f"{method}/{quantity}"] = jnp.mean(jnp.stack(list(per_layer.values())))
        statistics |= {f"{method}/{quantity}/{layer}": v for layer, v in per_layer.items()}
    return statistics


def decision_counts(
    wanted_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """Valid positions of every sequence by what was decided for them, (..., B).

    wanted, target: by a causal rule and by training; both: by either of them alike; agreed: both
    or neither; positions: all.
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
    """Shares, elementwise, from those counts; capacity is of the positions that are wanted."""

    def share(part, whole):
        return counts[part] / counts[whole].clip(1)

    return {
        "accuracy": share("agreed", "positions"),
        "precision": share("both", "wanted"),
        "recall": share("both", "target"),
        "capacity": share("wanted", "positions"),
    }


class Quality(NamedTuple):
    """A routed layer's causal decisions against what training would select.

    accuracy, precision, recall: shares; always answering "no" has accuracy 1 - capacity.
    capacity: share of positions processed. overflow: share of positions that found no room.
    most: the largest share of one sequence's positions that was processed.
    """

    accuracy: float
    precision: float
    recall: float
    capacity: float
    overflow: float
    most: float


def quality(
    counts: Mapping[str, Mapping[str, np.ndarray]], weight_B: np.ndarray
) -> dict[str, Quality]:
    """Each routed layer's, under its place and its repetition, as in 1_mod.0.

    counts: of its record, for every sequence, (B, G). Sequences of weight 0 are padding.
    """
    found = {}
    for name, of in counts.items():
        if "wanted" not in of:  # another layer's
            continue
        total = {key: count_BG[weight_B > 0].sum(0) for key, count_BG in of.items()}
        share_BG = of["selected"] / np.maximum(of["positions"], 1)
        for g, positions in enumerate(total["positions"]):
            wanted, selected = total["wanted"][g], total["selected"][g]
            shares = decision_quality({key: total_G[g] for key, total_G in total.items()}) | {
                "capacity": selected / positions,
                "overflow": (wanted - selected) / positions,
                "most": share_BG[:, g].max(),
            }
            found[f"{name}.{g}"] = Quality(**{key: float(share) for key, share in shares.items()})
    return found


def mean_quality(qualities: Iterable[Quality]) -> Quality | None:
    """The mean over layers; of `most`, the largest. None where there is none."""
    values = np.array(list(qualities))
    if not len(values):
        return None
    mean = Quality._make(values.mean(axis=0).tolist())
    return mean._replace(most=float(values[:, -1].max()))
