"""Loss on a fixed set of validation windows, and what the layers counted there.

Legend: B sequences, G repetitions of a layer.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from modjax.data.batches import Batch, eval_batches
from modjax.data.cache import TokenCache
from modjax.data.manifest import Manifest, bits_per_byte
from modjax.nn.expert_record import shares
from modjax.nn.routed import mean_quality, quality
from modjax.nn.sharding import LOGICAL_TO_MESH, ways
from modjax.spec import TrainConfig

# Sequences of one pass, whatever the run's own batch: how many are computed at once decides how
# sums are rounded, and that decides near ties.
EVAL_BATCH = 8


class Scores(NamedTuple):
    """Per sequence: summed loss in nats, tokens scored, and what each layer's record counts."""

    loss_B: np.ndarray
    weight_B: np.ndarray
    counts: dict[str, dict[str, np.ndarray]]


class Evaluation(NamedTuple):
    """loss: mean over tokens, in nats. sem: its standard error over sequences. tokens: scored."""

    loss: float
    sem: float
    tokens: int


class Measured(NamedTuple):
    """Results of an evaluation.

    evaluation: as trained.
    routed: the record's fields causal_*, moe_* and near_ties, as far as there are.
    metrics: all that was measured, under its names in metrics.jsonl.
    """

    evaluation: Evaluation
    routed: dict[str, Any]
    metrics: dict[str, float]


def eval_batch_size(mesh: Mesh) -> int:
    """Returns EVAL_BATCH, or the next number of sequences that splits evenly over the mesh."""
    parts = ways(mesh, LOGICAL_TO_MESH["batch"])
    return -(-EVAL_BATCH // parts) * parts


def validation_batches(cache: TokenCache, train: TrainConfig, mesh: Mesh) -> Iterator[Batch]:
    """Yields the windows of a run's evaluation. Raises InputError where the split is too small."""
    return eval_batches(
        cache,
        seq_len=train.seq_len,
        batch_size=eval_batch_size(mesh),
        sequences=train.eval_sequences,
    )


def evaluate(eval_step: Callable, weights: Any, batches: Iterable[Any]) -> Scores:
    """Runs `eval_step` (see programs.compile_eval_step) over batches that are on the device."""
    # Every batch is dispatched before the first result is fetched.
    results = [eval_step(weights, batch, jnp.int32(i)) for i, batch in enumerate(batches)]
    return Scores(
        *jax.tree.map(lambda *parts: np.concatenate([np.float64(part) for part in parts]), *results)
    )


def summarise(scores: Scores) -> Evaluation:
    """Mean and standard error from each sequence's summed loss and weight.

    The mean is the ratio R = sum(loss) / sum(weight); its standard error is the linearised one
    of a ratio, sqrt(n / (n - 1) * sum((loss - R weight)^2)) / sum(weight) (Cochran 1977,
    Sampling Techniques, section 2.11). Sequences of weight 0 are padding.
    """
    kept = scores.weight_B > 0
    loss_B, weight_B = scores.loss_B[kept], scores.weight_B[kept]
    n, total = len(weight_B), float(weight_B.sum())
    mean = float(loss_B.sum()) / total
    spread = float(np.square(loss_B - mean * weight_B).sum())
    return Evaluation(mean, (n / max(n - 1, 1) * spread) ** 0.5 / total, round(total))


def difference(ours: Scores, theirs: Scores) -> Evaluation:
    """Our loss less theirs on the same sequences; paired, so its error is that of differences."""
    return summarise(ours._replace(loss_B=ours.loss_B - theirs.loss_B))


def near_ties(scores: Scores) -> int | None:
    """Returns the selections that end in a near tie, over layers and sequences; None without any.

    Each top k of a sequence is one selection, or each expert's; see ROUNDING in nn/routing.py.
    """
    kept = scores.weight_B > 0
    each = [of["near_ties"][kept].sum() for of in scores.counts.values() if "near_ties" in of]
    return int(sum(each)) if each else None


def measured(scores: dict[str, Scores], manifest: Manifest) -> Measured:
    """Returns what a run's scores say: by routing, "trained" and at most one that is causal."""
    trained = scores["trained"]
    result = summarise(trained)
    metrics = {
        "eval_loss": result.loss,
        "eval_loss_sem": result.sem,
        "eval_bits_per_byte": bits_per_byte(manifest, result.loss),
    }
    dropped = shares(trained.counts, trained.weight_B)
    routed: dict[str, Any] = {f"moe_{name}": value for name, value in dropped.items()}
    metrics |= {f"eval_moe/{name}": value for name, value in dropped.items()}
    ties = near_ties(trained)
    if ties is not None:
        routed["near_ties"] = metrics["eval_near_ties"] = ties
    for routing in scores.keys() - {"trained"}:
        blocks = quality(scores[routing].counts, scores[routing].weight_B)
        mean = mean_quality(blocks.values())
        gap = difference(scores[routing], trained)
        causal = {
            "causal_loss": summarise(scores[routing]).loss,
            "causal_difference": gap.loss,
            "causal_difference_sem": gap.sem,
            "causal_accuracy": mean and mean.accuracy,
            "causal_capacity": mean and mean.capacity,
        }
        routed |= {"causal_routing": routing, **causal}
        metrics |= {f"eval_{name}": value for name, value in causal.items() if value is not None}
        for block, found in blocks.items():
            metrics |= {f"eval_{routing}/{k}/{block}": v for k, v in found._asdict().items()}
    return Measured(result, routed, metrics)
