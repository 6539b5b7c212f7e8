"""Loss on a fixed set of validation windows."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Evaluation(NamedTuple):
    """loss: mean over tokens, in nats. sem: its standard error over sequences. tokens: scored."""

    loss: float
    sem: float
    tokens: int


def evaluate(eval_step: Callable, params: Any, batches: Iterable[Any]) -> Evaluation:
    """Runs `eval_step` (see step.make_eval_step) over batches that are on the device."""
    # Every batch is dispatched before the first result is fetched.
    results = [eval_step(params, batch, jnp.int32(i)) for i, batch in enumerate(batches)]
    loss_B = np.concatenate([np.asarray(loss, np.float64) for loss, _ in results])
    weight_B = np.concatenate([np.asarray(weight, np.float64) for _, weight in results])
    return summarise(loss_B, weight_B)


def summarise(loss_B: np.ndarray, weight_B: np.ndarray) -> Evaluation:
    """Mean and standard error from each sequence's summed loss and weight.

    The mean is the ratio R = sum(loss) / sum(weight); its standard error is the linearised one
    of a ratio, sqrt(n / (n - 1) * sum((loss - R weight)^2)) / sum(weight) (Cochran 1977,
    Sampling Techniques, section 2.11). Sequences of weight 0 are padding.
    """
    loss_B, weight_B = loss_B[weight_B > 0], weight_B[weight_B > 0]
    n, total = len(weight_B), float(weight_B.sum())
    mean = float(loss_B.sum()) / total
    spread = float(np.square(loss_B - mean * weight_B).sum())
    return Evaluation(mean, (n / max(n - 1, 1) * spread) ** 0.5 / total, round(total))
