"""Loss on a fixed set of validation windows, and the layers' counts there.

Legend: B batch, A layers of one kind.
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
from modjax.nn.records import Counts, outcomes
from modjax.nn.sharding import LOGICAL_TO_MESH, ways
from modjax.specs import TrainConfig
from modjax.training.mesh import put_batch

# Sequences of one pass, whatever the run's own batch: how many are computed at once decides how
# sums are rounded, and that decides near ties.
EVAL_BATCH = 8


class Scores(NamedTuple):
    """Per sequence: summed loss in nats, tokens scored, and the counts of each layer's record."""

    loss_B: np.ndarray
    weight_B: np.ndarray
    counts: dict[str, Counts]


class Evaluation(NamedTuple):
    """loss: mean over tokens, in nats. sem: its standard error over sequences. tokens: scored."""

    loss: float
    sem: float
    tokens: int


def eval_batch_size(mesh: Mesh) -> int:
    """Returns EVAL_BATCH, or the next number of sequences that splits evenly over the mesh."""
    parts = ways(mesh, LOGICAL_TO_MESH["batch"])
    return -(-EVAL_BATCH // parts) * parts


def validation_batches(cache: TokenCache, train: TrainConfig, mesh: Mesh) -> Iterator[Batch]:
    """Returns the windows of a run's evaluation on the devices of `mesh`.

    Raises InputError, before the first one, where the validation split is too small.
    """
    size, sequences = eval_batch_size(mesh), train.eval_sequences
    batches = eval_batches(cache, seq_len=train.seq_len, batch_size=size, sequences=sequences)
    return (put_batch(batch, mesh) for batch in batches)


def evaluate(eval_step: Callable, weights: Any, batches: Iterable[Any]) -> Scores:
    """Runs `eval_step` (see programs.compile_eval_step) over batches that are on the device."""
    # Every batch is dispatched before the first result is fetched.
    results = [eval_step(weights, batch, jnp.int32(i)) for i, batch in enumerate(batches)]
    return Scores(*jax.tree.map(lambda *parts: np.concatenate(parts, dtype=np.float64), *results))


def summarise(scores: Scores) -> Evaluation:
    """Returns mean and standard error from each sequence's summed loss and weight.

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
    """Returns our loss less theirs on the same sequences, with the error of paired differences."""
    return summarise(ours._replace(loss_B=ours.loss_B - theirs.loss_B))


def outcome(scores: Scores) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns the numbers of the layers' records in an evaluation: of all, and of each layer."""
    kept = scores.weight_B > 0  # the others are padding
    return outcomes(jax.tree.map(lambda count_BA: count_BA[kept], scores.counts))


def measured(
    scores: dict[str, Scores], manifest: Manifest
) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the fields of a run's record that an evaluation decides, and its line of metrics.

    scores: by routing, "trained" and, where it was taken, "causal".
    """
    trained = scores["trained"]
    loss, sem, tokens = summarise(trained)
    bits = bits_per_byte(manifest, loss)
    found: dict[str, Any] = {"eval_loss": loss, "eval_loss_sem": sem, "eval_bits_per_byte": bits}
    metrics, numbers = dict(found), {}
    for routing, one in scores.items():
        whole, layers = outcome(one)
        numbers |= {f"{routing}/{name}": value for name, value in whole.items()}
        if routing == "trained":
            continue
        gap = difference(one, trained)
        gaps = {"causal_difference": gap.loss, "causal_difference_sem": gap.sem}
        losses = {"causal_loss": summarise(one).loss, **gaps}
        found |= losses
        metrics |= {f"eval_{name}": value for name, value in losses.items()}
        for layer, of in layers.items():
            metrics |= {f"eval_{routing}/{name}/{layer}": value for name, value in of.items()}
    metrics |= {f"eval_{name}": value for name, value in numbers.items()}
    return {**found, "eval_tokens": tokens, "outcome": numbers}, metrics
