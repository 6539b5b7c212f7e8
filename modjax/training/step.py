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
from modjax.nn import decision_counts, routing_losses, update_thresholds
from modjax.nn.sharding import constrain
from modjax.training.optimizer import Schedule, gradient_norm, learning_rate, make_optimizer
from modjax.training.state import Model, TrainState

TRAIN_STREAM, EVAL_STREAM = 1, 2


def token_losses(
    graphdef: Any, params: Any, batch: Any, document_mask: bool, key: jax.Array, **routing: Any
) -> tuple[jax.Array, Any]:
    """Cross-entropy of every position (B, L) in nats, from float32 logits, and the model's aux.

    routing: `routing` and `slack`, as Transformer takes them.
    """
    model = nnx.merge(graphdef, params)
    inputs_BL = constrain(batch.inputs_BL, "batch", "length")
    segment_ids_BL = batch.segment_ids_BL if document_mask else None
    logits_BLV, aux = model(inputs_BL, segment_ids_BL, key=key, **routing)
    logits_BLV = constrain(logits_BLV, "batch", "length", "vocab")
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL), aux


def make_train_step(
    model: Model, train: TrainConfig
) -> Callable[[TrainState, Batch, Schedule], tuple[TrainState, dict[str, Any]]]:
    """A pure function (state, batch, schedule) -> (state, metrics); jit it with the state donated.

    The loss is sum(weight * nll) / sum(weight) over the whole batch, however it is accumulated;
    the routers' own losses are added to what is minimised, not to what is reported.
    metrics: loss, the mean over the loss_steps steps since `state.forget_losses`; of this step
    grad_norm (before clipping, without predictors), learning_rate, diverged_step, and `aux`, what
    the routers of the forward pass returned. Steps count from 1; randomness is
    drawn from (seed, step).
    """

    def objective(params, batch, key, total_weight):
        nll_BL, aux = token_losses(model.graphdef, params, batch, train.document_mask, key)
        loss = jnp.sum(nll_BL * batch.weights_BL) / total_weight
        return loss + routing_losses(aux) / train.accumulation, (loss, aux)

    gradient = jax.grad(objective, has_aux=True)

    def accumulated(params, batch, key, total_weight):
        # Strided rows, so that every device keeps the rows that it already has.
        batch_ABL = jax.tree.map(
            lambda x_BL: x_BL.reshape(-1, train.accumulation, x_BL.shape[1]).swapaxes(0, 1), batch
        )

        def add(total, item):
            micro_batch, index = item
            grads, (loss, aux) = gradient(
                params, micro_batch, jax.random.fold_in(key, index), total_weight
            )
            return jax.tree.map(jnp.add, total, (grads, loss)), aux

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        indices_A = jnp.arange(train.accumulation)
        (grads, loss), aux_AGB = jax.lax.scan(add, zero, (batch_ABL, indices_A))

        def one_batch(x_AGB):
            x_GBA = jnp.moveaxis(x_AGB, 0, 2)
            return x_GBA.reshape(x_GBA.shape[0], -1, *x_GBA.shape[3:])

        return grads, (loss, jax.tree.map(one_batch, aux_AGB))

    gradients = gradient if train.accumulation == 1 else accumulated

    def train_step(state, batch, schedule):
        optimizer = make_optimizer(train, schedule, model.logical_axes)
        key = stream_key(schedule.seed, TRAIN_STREAM, state.step)
        total_weight = jnp.maximum(jnp.sum(batch.weights_BL), 1.0)
        grads, (loss, aux) = gradients(state.params, batch, key, total_weight)
        grad_norm = gradient_norm(grads, model.logical_axes)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int counters with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params |= {"blocks": update_thresholds(params["blocks"], aux, state.step)}
        step = state.step + 1
        diverged = (state.diverged_step == 0) & ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        new_state = TrainState(
            params=params,
            opt_state=opt_state,
            step=step,
            diverged_step=jnp.where(diverged, step, state.diverged_step),
            loss_sum=state.loss_sum + loss,
            loss_steps=state.loss_steps + 1,
        )
        metrics = {
            "loss": new_state.loss_sum / new_state.loss_steps.astype(jnp.float32),
            "loss_steps": new_state.loss_steps,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(schedule, state.step),
            "diverged_step": new_state.diverged_step,
            "aux": aux,
        }
        return new_state, metrics

    return train_step


def make_eval_step(
    graphdef: Any, train: TrainConfig, **routing: Any
) -> Callable[[Any, Batch, jax.Array, jax.Array], tuple[jax.Array, jax.Array, dict[str, Any]]]:
    """A pure function (params, batch, seed, index) of an evaluation batch.

    Returns the summed loss and the weight of each sequence, (B,), and of each routed block what
    `routing` decided: see `decisions`.
    """

    def eval_step(params, batch, seed, index):
        key = stream_key(seed, EVAL_STREAM, index)
        nll_BL, aux = token_losses(graphdef, params, batch, train.document_mask, key, **routing)
        loss_B = jnp.sum(nll_BL * batch.weights_BL, axis=1)
        weight_B = jnp.sum(batch.weights_BL, axis=1)
        return loss_B, weight_B, decisions(aux, batch.segment_ids_BL > 0)

    return eval_step


def decisions(aux: Any, valid_BL: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Per slot of the pattern, counts (B, G) of positions by what routing decided for them.

    Those of decision_counts, and selected: processed.
    """
    found = {}
    for name, slot in aux.items():
        counts = decision_counts(slot["wanted_BL"], slot["target_BL"], valid_BL)
        selected_GBL = slot["selected_BL"] & valid_BL[None]
        counts["selected"] = jnp.sum(selected_GBL, axis=2, dtype=jnp.float32)
        found[name] = {key: count_GB.T for key, count_GB in counts.items()}
    return found


def stream_key(seed: jax.Array, stream: int, index: jax.Array) -> jax.Array:
    """The key of one step, or evaluation batch, of one seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)
