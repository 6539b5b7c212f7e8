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
from modjax.data.manifest import Manifest, bits_per_byte
from modjax.data.token_cache import TokenCache
from modjax.nn.records import Counts, outcomes
from modjax.sharding import LOGICAL_TO_MESH, num_shards
from modjax.specs import TrainConfig
from modjax.training.mesh import local_rows, put_batch

# Sequences per forward pass, whatever the run's own batch size. The number decides how sums are
# rounded, and rounding decides near ties.
EVAL_BATCH = 8


class Scores(NamedTuple):
    """Scores of each sequence of an evaluation.

    loss_B: summed loss in nats.
    weight_B: number of scored tokens; 0 for sequences that pad the last batch.
    counts: counts of each layer's record, (B, A).
    """

    loss_B: np.ndarray
    weight_B: np.ndarray
    counts: dict[str, Counts]


class Evaluation(NamedTuple):
    """Result of an evaluation.

    loss: mean over tokens, in nats.
    sem: standard error of the loss, over sequences.
    tokens: number of scored tokens.
    """

    loss: float
    sem: float
    tokens: int


def eval_batch_size(mesh: Mesh) -> int:
    """Returns EVAL_BATCH, rounded up to a number of sequences that splits evenly over the mesh."""
    parts = num_shards(mesh, LOGICAL_TO_MESH["batch"])
    return -(-EVAL_BATCH // parts) * parts


def validation_batches(cache: TokenCache, train: TrainConfig, mesh: Mesh) -> Iterator[Batch]:
    """Returns an iterator over the validation windows of a run, on the devices of `mesh`.

    Raises InputError, before the first batch, if the validation split is too small.
    """
    size, sequences = eval_batch_size(mesh), train.eval_sequences
    batches = eval_batches(
        cache,
        seq_len=train.seq_len,
        batch_size=size,
        sequences=sequences,
        rows=local_rows(mesh, size),
    )
    return (put_batch(batch, mesh, size) for batch in batches)


def evaluate(eval_step: Callable, weights: Any, batches: Iterable[Any]) -> Scores:
    """Runs `eval_step`, see `programs.compile_eval_step`, on batches that are on the device."""
    # Every batch is dispatched before the first result is fetched.
    results = [eval_step(weights, batch, jnp.int32(i)) for i, batch in enumerate(batches)]
    return Scores(*jax.tree.map(lambda *parts: np.concatenate(parts, dtype=np.float64), *results))


def summarise(scores: Scores) -> Evaluation:
    """Returns the mean loss per token and its standard error.

    The mean is the ratio R = sum(loss) / sum(weight). Its standard error is that of a linearised
    ratio, sqrt(n / (n - 1) * sum((loss - R weight)^2)) / sum(weight) (Cochran 1977, Sampling
    Techniques, section 2.11).
    """
    scored = scores.weight_B > 0
    loss_B, weight_B = scores.loss_B[scored], scores.weight_B[scored]
    n, total = len(weight_B), float(weight_B.sum())
    mean = float(loss_B.sum()) / total
    spread = float(np.square(loss_B - mean * weight_B).sum())
    return Evaluation(mean, (n / max(n - 1, 1) * spread) ** 0.5 / total, round(total))


def difference(ours: Scores, theirs: Scores) -> Evaluation:
    """Returns our loss minus theirs on the same sequences, with the error of paired differences."""
    return summarise(ours._replace(loss_B=ours.loss_B - theirs.loss_B))


def outcome(scores: Scores) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns the outcome numbers of all layers together, and those of each layer by name."""
    scored = scores.weight_B > 0
    return outcomes(jax.tree.map(lambda count_BA: count_BA[scored], scores.counts))


def summary(
    scores: dict[str, Scores], manifest: Manifest
) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the fields of the run's record, and the line of metrics, from an evaluation.

    scores: by routing: "trained", and "causal" for a model that then selects by another rule.
    """
    loss, sem, tokens = summarise(scores["trained"])
    bits = bits_per_byte(manifest, loss)
    found: dict[str, Any] = {"eval_loss": loss, "eval_loss_sem": sem, "eval_bits_per_byte": bits}
    metrics, numbers = dict(found), {}
    for routing, one in scores.items():
        whole, layers = outcome(one)
        numbers |= {f"{routing}/{name}": value for name, value in whole.items()}
        if routing == "causal":
            loss, gap = summarise(one).loss, difference(one, scores["trained"])
            losses = {"loss": loss, "difference": gap.loss, "difference_sem": gap.sem}
            found |= {f"causal_{name}": value for name, value in losses.items()}
            metrics |= {f"eval_causal_{name}": value for name, value in losses.items()}
            for layer, of in layers.items():
                metrics |= {f"eval_causal/{name}/{layer}": value for name, value in of.items()}
    metrics |= {f"eval_{name}": value for name, value in numbers.items()}
    return {**found, "eval_tokens": tokens, "outcome": numbers}, metrics
