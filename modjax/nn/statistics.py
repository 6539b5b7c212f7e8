"""Scalars that describe the routing of one forward pass.

Legend: B batch, L positions, A routed blocks, G groups.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Aux = dict[str, dict[str, Any]]


def routing_statistics(aux: Aux, valid_BL: jax.Array | None = None) -> dict[str, jax.Array]:
    """Scalars over the valid positions of one forward pass; {} for a dense model.

    router/score_mean, score_std: of the raw scores, averaged over routed blocks.
    router/position_entropy: entropy of "which position was processed", from the batch's counts,
      averaged over routed blocks and divided by log L: 1 where every position is equally often.
    router/chosen_by_all, chosen_by_none: share of positions that every, or no, routed block took.
    router/capacity: share of positions that were processed, averaged over routed blocks.
    router/overflow: share of positions that asked to be processed and found no room.
    router/underload: capacity that was left unused, as a share of positions.
    loss/NAME: weighted losses of the routers, summed over routed blocks.
    METHOD/accuracy, precision, recall, capacity: of the ways that were taught to select without
      the future, against what training selects; averaged, and per block as METHOD/accuracy/BLOCK,
      where BLOCK is the slot of the pattern and its repetition, as in 1_mod.0.
    """
    if not aux:
        return {}
    scores_ABL, selected_ABL, wanted_ABL = (
        jnp.concatenate([slot[name] for slot in aux.values()])
        for name in ("scores_BL", "selected_BL", "wanted_BL")
    )
    length = scores_ABL.shape[-1]
    if valid_BL is None:
        valid_BL = jnp.ones(scores_ABL.shape[1:], bool)
    count = jnp.sum(valid_BL).astype(jnp.float32)
    masked_ABL = jnp.where(valid_BL[None], scores_ABL, 0.0)
    mean_A = jnp.sum(masked_ABL, axis=(1, 2)) / count
    centred_ABL = jnp.where(valid_BL[None], scores_ABL - mean_A[:, None, None], 0.0)
    std_A = jnp.sqrt(jnp.sum(jnp.square(centred_ABL), axis=(1, 2)) / count)
    chosen_AL = jnp.sum(selected_ABL, axis=1).astype(jnp.float32)
    share_AL = chosen_AL / jnp.maximum(jnp.sum(chosen_AL, axis=1, keepdims=True), 1.0)
    entropy_A = -jnp.sum(jax.scipy.special.xlogy(share_AL, share_AL), axis=1) / math.log(length)
    unused_AB = jnp.concatenate([slot["k_B"] for slot in aux.values()]) - jnp.sum(
        selected_ABL, axis=2
    )
    positions = count * chosen_AL.shape[0]
    every_BL = jnp.all(selected_ABL, axis=0) & valid_BL
    none_BL = ~jnp.any(selected_ABL, axis=0) & valid_BL
    statistics = {
        "router/score_mean": jnp.mean(mean_A),
        "router/score_std": jnp.mean(std_A),
        "router/position_entropy": jnp.mean(entropy_A),
        "router/chosen_by_all": jnp.sum(every_BL).astype(jnp.float32) / count,
        "router/chosen_by_none": jnp.sum(none_BL).astype(jnp.float32) / count,
        "router/capacity": jnp.sum(chosen_AL) / positions,
        "router/overflow": jnp.sum(wanted_ABL & ~selected_ABL).astype(jnp.float32) / positions,
        "router/underload": jnp.sum(jnp.maximum(unused_AB, 0)).astype(jnp.float32) / positions,
    }
    names = {name for slot in aux.values() for name in slot["losses"]}
    for name in sorted(names):
        losses_GB = [slot["losses"][name] for slot in aux.values() if name in slot["losses"]]
        total = sum(jnp.sum(jnp.mean(loss_GB, axis=1)) for loss_GB in losses_GB)
        statistics[f"loss/{name}"] = jnp.asarray(total)
    for method, logits in (("predictor", _predictor_logits), ("auxiliary", _auxiliary_logits)):
        statistics |= _foresight(method, {k: logits(v) for k, v in aux.items()}, aux, valid_BL)
    return statistics


def _predictor_logits(slot: dict[str, Any]) -> jax.Array | None:
    return slot.get("predictor_BL")


def _auxiliary_logits(slot: dict[str, Any]) -> jax.Array | None:
    return slot["scores_BL"] if "auxiliary" in slot["losses"] else None


def _foresight(method: str, logits: dict[str, Any], aux: Aux, valid_BL) -> dict[str, jax.Array]:
    """How well `logits` > 0 foretell the training selection, where there are any."""
    measured = {}
    for name, logits_GBL in logits.items():
        if logits_GBL is not None:
            counts = decision_counts(logits_GBL > 0, aux[name]["target_BL"], valid_BL)
            measured[name] = decision_quality(
                {key: jnp.sum(count_GB, axis=1) for key, count_GB in counts.items()}
            )
    statistics = {}
    for quantity in next(iter(measured.values()), ()):
        per_block = {
            f"{name}.{g}": value
            for name, quality in measured.items()
            for g, value in enumerate(quality[quantity])
        }
        statistics[f"{method}/{quantity}"] = jnp.mean(jnp.stack(list(per_block.values())))
        statistics |= {f"{method}/{quantity}/{block}": v for block, v in per_block.items()}
    return statistics


def decision_counts(
    wanted_GBL: jax.Array, target_GBL: jax.Array, valid_BL: jax.Array
) -> dict[str, jax.Array]:
    """Valid positions of every sequence by what was decided for them, (G, B).

    wanted, target: by a causal rule and by training; both: by either of them alike; agreed: both
    or neither; positions: all.
    """
    masks = {
        "wanted": wanted_GBL,
        "target": target_GBL,
        "both": wanted_GBL & target_GBL,
        "agreed": wanted_GBL == target_GBL,
        "positions": jnp.ones_like(wanted_GBL),
    }
    return {
        name: jnp.sum(mask_GBL & valid_BL[None], axis=2, dtype=jnp.float32)
        for name, mask_GBL in masks.items()
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
