"""Thresholds of Skip, measured anew for weights that no longer change.

Legend: B batch, L positions.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.data.batches import train_batch
from modjax.data.token_cache import cache_dir, open_cache
from modjax.finished.runs import Loaded
from modjax.nn import observe
from modjax.specs import Quantile
from modjax.specs.fields import parts

ROUNDS, TOKENS = 8, 4096  # of a round: a few times those of a training step


def calibrated(run: Loaded, data_dir: Path) -> Any:
    """Returns the weights of a run after its thresholds have followed more text, without updates.

    A training step is small, and so its quantile is noisy: a threshold that follows a few of them
    misses the capacity by some percent. The text is that of the first training steps.
    """
    train, data = run.spec.train, run.spec.data
    if not any(isinstance(part, Quantile) for part in parts(run.spec.model, deep=True)):
        return run.weights
    cache = open_cache(cache_dir(data_dir, data))
    rows = max(1, TOKENS // train.seq_len)

    @jax.jit
    def follow(weights, batch, updates):
        segments_BL = batch.segment_ids_BL if train.document_mask else None
        model, key = nnx.merge(run.graphdef, weights), jax.random.key(updates)
        _, records = model.features(batch.inputs_BL, segments_BL, key=key)
        blocks, _ = observe(weights["stack"]["blocks"], records, updates, stacked=True)
        return {**weights, "stack": {**weights["stack"], "blocks": blocks}}

    weights = run.weights
    for i in range(ROUNDS):
        batch = train_batch(cache, seq_len=train.seq_len, batch_size=rows, seed=data.seed, step=i)
        weights = follow(weights, batch, jnp.int32(train.steps + i))
    return weights
