"""The pure functions of training: loss, train step and evaluation step.

Legend: B batch, L positions, V vocabulary, A micro-batches, G groups of layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from modjax.config import TrainConfig
from modjax.data.batches import Batch
from modjax.nn.sharding import constrain
from modjax.training.optimizer import learning_rate
from modjax.training.state import TrainState

TRAIN_STREAM, EVAL_STREAM = 1, 2


def token_losses(
    graphdef: Any, params: Any, batch: Any, document_mask: bool, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Cross-entropy of every position (B, L) in nats, from float32 logits, and the model's aux."""
    model = nnx.merge(graphdef, params)
    inputs_BL = constrain(batch.inputs_BL, "batch", "length")
    segment_ids_BL = batch.segment_ids_BL if document_mask else None
    logits_BLV, aux = model(inputs_BL, segment_ids_BL, key=key)
    logits_BLV = constrain(logits_BLV, "batch", "length", "vocab")
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL), aux


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, train: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """A pure function (state, batch) -> (state, metrics); jit it with the state donated.

    The loss is sum(weight * nll) / sum(weight) over the whole batch, however it is accumulated.
    metrics: loss, grad_norm (before clipping), learning_rate, diverged_step, and `aux`, what the
    routers of the forward pass returned. Steps count from 1; randomness is drawn from (seed, step).
    """

    def weighted_loss(params, batch, key, total_weight):
        nll_BL, aux = token_losses(graphdef, params, batch, train.document_mask, key)
        return jnp.sum(nll_BL * batch.weights_BL) / total_weight, aux

    value_and_grad = jax.value_and_grad(weighted_loss, has_aux=True)

    def accumulated(params, batch, key, total_weight):
        # Strided rows, so that every device keeps the rows that it already has.
        batch_ABL = jax.tree.map(
            lambda x_BL: x_BL.reshape(-1, train.accumulation, x_BL.shape[1]).swapaxes(0, 1), batch
        )

        def add(total, item):
            micro_batch, index = item
            (loss, aux), grads = value_and_grad(
                params, micro_batch, jax.random.fold_in(key, index), total_weight
            )
            return jax.tree.map(jnp.add, total, (loss, grads)), aux

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        indices_A = jnp.arange(train.accumulation)
        (loss, grads), aux_AGBL = jax.lax.scan(add, zero, (batch_ABL, indices_A))
        aux = jax.tree.map(
            lambda x_AGBL: jnp.moveaxis(x_AGBL, 0, 2).reshape(x_AGBL.shape[1], -1, x_AGBL.shape[3]),
            aux_AGBL,
        )
        return (loss, aux), grads

    gradients = value_and_grad if train.accumulation == 1 else accumulated

    def train_step(state, batch):
        key = stream_key(train.seed, TRAIN_STREAM, state.step)
        total_weight = jnp.maximum(jnp.sum(batch.weights_BL), 1.0)
        (loss, aux), grads = gradients(state.params, batch, key, total_weight)
        grad_norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int counters with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        step = state.step + 1
        diverged = (state.diverged_step == 0) & ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        new_state = TrainState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            step=step,
            diverged_step=jnp.where(diverged, step, state.diverged_step),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(train, state.step),
            "diverged_step": new_state.diverged_step,
            "aux": aux,
        }
        return new_state, metrics

    return train_step


def make_eval_step(
    graphdef: Any, train: TrainConfig
) -> Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]:
    """A pure function (params, batch, index) -> summed loss and weight of each sequence, (B,)."""

    def eval_step(params, batch, index):
        key = stream_key(train.seed, EVAL_STREAM, index)
        nll_BL, _ = token_losses(graphdef, params, batch, train.document_mask, key)
        return jnp.sum(nll_BL * batch.weights_BL, axis=1), jnp.sum(batch.weights_BL, axis=1)

    return eval_step


def stream_key(seed: int, stream: int, index: jax.Array) -> jax.Array:
    """The key of one step, or evaluation batch, of one seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)
