"""Records of which positions were routed, requested, dropped and processed.

Legend: B batch, L positions, P picks of a position, E experts, A layers of one kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.nn.records import Record

PARTS = 4  # of a sequence, for which dropped picks are reported apart


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Record):
    """Record of the positions that a routed layer requested and processed.

    scores_BL: raw scores.
    target_BL: positions that training selects.
    requested_BL: positions that were requested.
    selected_BL: positions that were processed; the other requested ones were dropped.
    k_B: the capacity of each row, in positions.
    tied_B: whether training's top k ended in a near tie, see Selection; None without a top k.
    """

    scores_BL: jax.Array
    target_BL: jax.Array
    requested_BL: jax.Array
    selected_BL: jax.Array
    k_B: jax.Array
    tied_B: jax.Array | None

    def counts(self, valid_BL):
        counts = decisions(self.requested_BL, self.target_BL, valid_BL)
        counts["selected"] = jnp.sum(self.selected_BL & valid_BL, axis=-1, dtype=jnp.float32)
        ties = {} if self.tied_B is None else {"near_ties": self.tied_B.astype(jnp.float32)}
        return counts | ties

    @classmethod
    def outcome(cls, counts):
        """Returns metrics by name, from the counts of each layer by its path.

        accuracy, precision, recall: of the requested positions as a prediction of training's
          selection, averaged over layers. Requesting nothing has an accuracy of 1 - capacity.
        capacity, overflow: shares of positions processed and dropped, averaged over layers.
        most: the largest share of one sequence that any layer processed.
        near_ties: number of selections that end in a near tie, over all layers and sequences.
        """
        each = []
        for of in counts.values():
            total = {name: count_B.sum() for name, count_B in of.items()}
            shares = decision_shares(total)
            shares["capacity"] = total["selected"] / total["positions"]
            shares["overflow"] = (total["wanted"] - total["selected"]) / total["positions"]
            shares["most"] = np.max(of["selected"] / np.maximum(of["positions"], 1))
            each.append(shares)
        found = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
        found["most"] = float(max(one["most"] for one in each))
        return found | _near_ties(counts, "near_ties")

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars over the valid positions of one forward pass.

        router/score_mean, score_std: of the raw scores, averaged over layers.
        router/position_entropy: entropy, over the places in a row, of the batch's processed
          positions, divided by log L and averaged over layers. It is 1 if all places are equal.
        router/chosen_by_all, chosen_by_none: shares of positions that all, or no, layers processed.
        router/capacity, overflow: shares of positions that were processed, and that were dropped.
        router/underload: unused capacity, as a share of positions.
        """
        scores_ABL, selected_ABL, wanted_ABL, k_AB = _stacked(
            records, "scores_BL", "selected_BL", "requested_BL", "k_B"
        )
        count = jnp.sum(valid_BL).astype(jnp.float32)
        positions = count * len(k_AB)

        def share_of(number: jax.Array, whole: jax.Array) -> jax.Array:
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
            "router/chosen_by_all": share_of(jnp.all(selected_ABL, axis=0) & valid_BL, count),
            "router/chosen_by_none": share_of(~jnp.any(selected_ABL, axis=0) & valid_BL, count),
            "router/capacity": share_of(selected_ABL, positions),
            "router/overflow": share_of(wanted_ABL & ~selected_ABL, positions),
            "router/underload": share_of(jnp.maximum(unused_AB, 0), positions),
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatched(Record):
    """Record of the picks of a mixture of experts, at valid positions.

    picked_BL: number of experts that were picked. taken_BL: number of these that computed.
    valid_BL: False marks padding.
    experts_BLP: the experts that each position picked, E for none.
    picks_B: number of picks, including no-ops.
    computed_B: number of positions that the experts computed, including empty slots.
    tied_BE: whether an expert's best positions end in a near tie; None unless experts choose.
    """

    picked_BL: jax.Array
    taken_BL: jax.Array
    valid_BL: jax.Array
    experts_BLP: jax.Array
    picks_B: jax.Array
    computed_B: jax.Array
    tied_BE: jax.Array | None = None

    def counts(self, valid_BL):
        counts = {
            "picks": self.picks_B,
            "asked": jnp.sum(self.picked_BL, axis=1),
            "taken": jnp.sum(self.taken_BL, axis=1),
            "computed": self.computed_B,
        }
        ties = {} if self.tied_BE is None else {"near_ties": jnp.sum(self.tied_BE, axis=1)}
        return counts | ties

    @classmethod
    def outcome(cls, counts):
        """Returns moe/dropped, no_op and useful, see `statistics`, and the number of near ties."""
        names = ("picks", "asked", "taken", "computed")
        found = _pick_shares(*(sum(of[name].sum() for of in counts.values()) for name in names))
        shares = {name: float(value) for name, value in found.items()}
        return shares | _near_ties(counts, "moe/near_ties")

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars of one forward pass.

        moe/dropped: share of the picks of experts that found no free slot.
        moe/dropped/N of 4: the same share in the N-th quarter of the sequences.
        moe/no_op: share of the picks that are no-ops.
        moe/useful: share of the experts' computations that are of picks, not of empty slots.
        moe/idle: share of positions that no expert computed.
        """
        picked_ABL, taken_ABL, valid_ABL, picks_AB, computed_AB = _stacked(
            records, "picked_BL", "taken_BL", "valid_BL", "picks_B", "computed_B"
        )
        found = _pick_shares(*map(jnp.sum, (picks_AB, picked_ABL, taken_ABL, computed_AB)))
        parts = (jnp.array_split(count_ABL, PARTS, axis=2) for count_ABL in (picked_ABL, taken_ABL))
        for part, (asked, taken) in enumerate(zip(*parts, strict=True), 1):
            found[f"moe/dropped/{part} of {PARTS}"] = share(jnp.sum(asked - taken), jnp.sum(asked))
        idle_ABL = valid_ABL & (taken_ABL == 0)
        return found | {"moe/idle": share(jnp.sum(idle_ABL), jnp.sum(valid_ABL))}


def share(part: Any, whole: Any) -> Any:
    """Returns part / max(whole, 1)."""
    return part / whole.clip(1)


def decisions(
    requested_BL: jax.Array, target_BL: jax.Array, valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """Returns counts of the valid positions of every sequence by name, each (..., B).

    wanted: requested. target: selected by training.
    both: requested and selected. agreed: both, or neither. positions: all.
    """
    masks = {
        "wanted": requested_BL,
        "target": target_BL,
        "both": requested_BL & target_BL,
        "agreed": requested_BL == target_BL,
        "positions": jnp.ones_like(requested_BL),
    }
    return {
        name: jnp.sum(mask_BL & valid_BL, axis=-1, dtype=jnp.float32)
        for name, mask_BL in masks.items()
    }


def decision_shares(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns accuracy, precision, recall and capacity (the share requested) from `decisions`."""
    parts = {
        "accuracy": ("agreed", "positions"),
        "precision": ("both", "wanted"),
        "recall": ("both", "target"),
        "capacity": ("wanted", "positions"),
    }
    return {name: share(counts[part], counts[whole]) for name, (part, whole) in parts.items()}


def _pick_shares(picks: Any, asked: Any, taken: Any, computed: Any) -> dict[str, Any]:
    return {
        "moe/dropped": share(asked - taken, asked),
        "moe/no_op": share(picks - asked, picks),
        "moe/useful": share(taken, computed),
    }


def _stacked(records: Mapping[str, Record], *names: str) -> tuple[jax.Array, ...]:
    """Returns each named field of all records, concatenated along A."""
    return tuple(jnp.concatenate([getattr(r, name) for r in records.values()]) for name in names)


def _near_ties(counts: Mapping[str, Any], name: str) -> dict[str, int]:
    ties = [of["near_ties"].sum() for of in counts.values() if "near_ties" in of]
    return {name: int(sum(ties))} if ties else {}
