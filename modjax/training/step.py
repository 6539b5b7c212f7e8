"""The pure functions of training: loss, train step and evaluation step.

Legend: B batch, L positions, D model width, V vocabulary, U parts, A layers of one kind.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from modjax.data.batches import Batch
from modjax.kernels import cross_entropy
from modjax.nn import Record, TokenLoss, Transformer, in_chunks, losses, observe, totals
from modjax.nn.records import counts
from modjax.sharding import constrain
from modjax.specs import TrainConfig
from modjax.training.optimizer import Schedule, gradient_norm, learning_rate, optimizer_for
from modjax.training.state import Model, TrainState

TRAIN_STREAM, EVAL_STREAM = 1, 2

# objective(model, batch, **options) returns the loss of every position, (B, L), and the records.
# The options are passed to Transformer.features.
Objective = Callable[..., tuple[jax.Array, dict[str, Record]]]


def next_token(
    model: Transformer, batch: Any, **options: Any
) -> tuple[jax.Array, dict[str, Record]]:
    """Returns the cross-entropy of every position in nats, (B, L), and the records."""
    inputs_BL = constrain(batch.inputs_BL, "batch", "length")
    x_BLD, records = model.features(inputs_BL, **options)
    vocab = model.config.vocab_size
    return in_chunks(_nll, model.head, x_BLD, batch.targets_BL, numbers=vocab), records


@jax.named_scope("loss")
def _nll(head: Callable[[jax.Array], jax.Array], x_BLD: jax.Array, targets_BL: jax.Array):
    logits_BLV = constrain(head(x_BLD), "batch", "length", "vocab")
    return cross_entropy(logits_BLV, targets_BL)


def to_base(model: Transformer, batch: Any, **options: Any) -> tuple[jax.Array, dict[str, Record]]:
    """Returns KL(base || model) of every position in nats, (B, L), and the records.

    The base is the model under the routing "all". It gets no gradient.
    """
    graphdef, weights = nnx.split(model)
    base = nnx.merge(graphdef, jax.lax.stop_gradient(weights))
    inputs_BL = constrain(batch.inputs_BL, "batch", "length")
    x_BLD, records = model.features(inputs_BL, **options)
    options["routing"] = "all"
    base_BLD, _ = base.features(inputs_BL, **options)
    heads, numbers = (model.head, base.head), 2 * model.config.vocab_size
    return in_chunks(_kl, heads, x_BLD, base_BLD, numbers=numbers), records


@jax.named_scope("loss")
def _kl(heads: tuple[Callable[[jax.Array], jax.Array], ...], *features: jax.Array) -> jax.Array:
    ours_BLV, base_BLV = (
        jax.nn.log_softmax(constrain(head(x_BLD), "batch", "length", "vocab"))
        for head, x_BLD in zip(heads, features, strict=True)
    )
    return optax.losses.kl_divergence_with_log_targets(ours_BLV, base_BLV)


OBJECTIVES: dict[str, Objective] = {"next_token": next_token, "base": to_base}


def make_train_step(
    model: Model, train: TrainConfig, objective: Objective | None = None, **options: Any
) -> Callable[[TrainState, Batch, Schedule], tuple[TrainState, dict[str, Any]]]:
    """Returns a pure function (state, batch, schedule) -> (state, metrics). Donate `state` to it.

    The loss is sum(weight * loss) / sum(weight) over the whole batch, however it is accumulated.
    Layers' own losses are minimised with it, but not reported. Randomness is drawn from the seed
    and the number of earlier steps.

    objective: None takes that of `train`.
    options: for Transformer.features, such as layer_loop and remat.
    metrics:
      loss, loss_steps: mean loss, and number of steps, since `state.forget_losses`.
      grad_norm: gradient norm before clipping, without predictors.
      diverged_step: first step, counted from 1, whose loss or gradient was not finite, or 0.
      records: the layers' reports from the forward pass.
    """

    losses_of = objective or OBJECTIVES[train.objective]

    def train_step(state, batch, schedule):
        def forward(params, batch, key):
            merged = nnx.merge(model.graphdef, params, state.frozen, state.measured)
            return losses_of(merged, batch, **_from_batch(train, batch, key), **options)

        key, parts = stream_key(schedule.seed, TRAIN_STREAM, state.step), train.accumulation
        grads, (loss, records, tokens) = _gradient(forward, state.params, batch, key, parts)
        optimizer = optimizer_for(model.roles, model.decays, train, schedule)
        with jax.named_scope("optimizer"):
            grad_norm = gradient_norm(grads, model.roles)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes its int counters with floats
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        diverged = (state.diverged_step == 0) & ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        new_state = state._replace(
            params=params,
            measured=_observed(state, records, tokens),
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
            "records": records,
        }
        return new_state, metrics

    return train_step


def _gradient(
    forward: Callable, params: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, tuple[jax.Array, dict[str, Record], TokenLoss]]:
    """Returns the gradient of a batch, and its loss, records and loss of every position.

    forward: maps (params, batch, key) to the loss of every position, (B, L), and the records.
    parts: number of micro-batches to compute one after another. If a layer's loss needs sums over
      the whole batch, a forward pass over all of them comes first.
    """
    total_weight = jnp.maximum(jnp.sum(batch.weights_BL), 1.0)

    def minimised(params, batch, key, sums=None):
        loss_BL, records = forward(params, batch, key)
        loss = jnp.sum(loss_BL * batch.weights_BL) / total_weight
        tokens = TokenLoss(loss_BL, batch.weights_BL)
        own = losses(records, tokens, sums) / parts
        return loss + own, (loss, records, tokens)

    gradient = jax.grad(minimised, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key)
    # Strided rows, so that every device keeps the rows that it already has.
    batch_UBL = jax.tree.map(
        lambda x_BL: x_BL.reshape(-1, parts, *x_BL.shape[1:]).swapaxes(0, 1), batch
    )
    items = (batch_UBL, jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts)))

    def sums_of(item):
        return totals(forward(params, *item)[1])

    sums: Any = {}
    if jax.eval_shape(sums_of, jax.tree.map(lambda x: x[0], items)):
        sums = jax.tree.map(lambda x_U: jnp.mean(x_U, axis=0), jax.lax.map(sums_of, items))

    def add(total, item):
        grads, (loss, *rest) = gradient(params, *item, sums)
        return jax.tree.map(jnp.add, total, (grads, loss)), rest

    zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    (grads, loss), (records_UAB, tokens_UB) = jax.lax.scan(add, zero, items)
    tokens = jax.tree.map(lambda x_UB: _whole_batch(x_UB[:, None])[0], tokens_UB)
    return grads, (loss, jax.tree.map(_whole_batch, records_UAB), tokens)


def _whole_batch(x_UAB: jax.Array) -> jax.Array:
    """Merges the parts of a batch: returns (A, B, ...), with rows in the order of the batch."""
    x_ABU = jnp.moveaxis(x_UAB, 0, 2)
    return x_ABU.reshape(x_ABU.shape[0], -1, *x_ABU.shape[3:])


def _observed(state: TrainState, records: dict[str, Record], tokens: TokenLoss) -> Any:
    """Returns the measured numbers after the update."""
    if not state.measured:
        return state.measured
    old = state.measured["stack"]["blocks"]
    blocks, _ = observe(old, records, state.step, tokens, stacked=True)
    return {**state.measured, "stack": {"blocks": blocks}}


def make_eval_step(
    graphdef: Any, train: TrainConfig, objective: Objective = next_token, **options: Any
) -> Callable[[Any, Batch, jax.Array, jax.Array], tuple[jax.Array, jax.Array, dict[str, Any]]]:
    """Returns a pure function (weights, batch, seed, index) that evaluates one batch.

    It returns the summed loss and the weight of each sequence, (B,), and the counts of each layer's
    record, (B, A).

    weights: nested dict of all weights of the model.
    index: number of the batch, from which its random key is derived.
    options: for Transformer.features.
    """

    def eval_step(weights, batch, seed, index):
        key = stream_key(seed, EVAL_STREAM, index)
        model = nnx.merge(graphdef, weights)
        loss_BL, records = objective(model, batch, **_from_batch(train, batch, key), **options)
        loss_B = jnp.sum(loss_BL * batch.weights_BL, axis=1)
        weight_B = jnp.sum(batch.weights_BL, axis=1)
        return loss_B, weight_B, counts(records, batch.segment_ids_BL > 0)

    return eval_step


def _from_batch(train: TrainConfig, batch: Any, key: jax.Array) -> dict[str, Any]:
    return {"segment_ids_BL": batch.segment_ids_BL if train.document_mask else None, "key": key}


def stream_key(seed: jax.Array, stream: int, index: jax.Array) -> jax.Array:
    """Returns the random key of training step or evaluation batch `index`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)
