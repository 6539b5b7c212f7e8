"""AdamW with clipping, linear warm-up, and a cosine decay that ends at the last step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modjax.specs import TrainConfig


class Schedule(NamedTuple):
    """Fields of a TrainConfig that a compiled step takes as arguments, not as constants.

    Runs that differ in these fields alone share their compiled programs.
    """

    seed: jax.Array
    steps: jax.Array
    warmup_steps: jax.Array
    learning_rate: jax.Array
    final_learning_rate_fraction: jax.Array


def make_schedule(train: TrainConfig) -> Schedule:
    values = (getattr(train, name) for name in Schedule._fields)
    return Schedule(*(jnp.asarray(v, jnp.int32 if type(v) is int else jnp.float32) for v in values))


def learning_rate(schedule: Schedule, updates: jax.Array) -> jax.Array:
    """Returns the learning rate of the update that follows `updates` earlier ones.

    Let t = updates + 1, W the warm-up steps, T all steps, p the peak and f the final fraction. The
    rate is p t / W up to t = W, and then p (f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2)
    (arXiv 1608.03983, Eq. 5). The last update, t = T, has the rate p f.
    """
    t, warmup, steps = (
        x.astype(jnp.float32) for x in (updates + 1, schedule.warmup_steps, schedule.steps)
    )
    progress = jnp.clip((t - warmup) / jnp.maximum(steps - warmup, 1.0), 0.0, 1.0)
    floor = schedule.final_learning_rate_fraction
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    ramp = t / jnp.maximum(warmup, 1.0)
    return schedule.learning_rate * jnp.where(t <= warmup, ramp, cosine)


def optimizer_for(
    roles: Any, decays: Any, train: TrainConfig, schedule: Schedule
) -> optax.GradientTransformation:
    """Returns clipping by global norm, followed by AdamW (arXiv 1711.05101).

    Predictors are clipped separately, so that training one changes nothing else.

    roles, decays: role of each parameter and whether it decays, see modjax.nn.params.
    """
    rate: Any = functools.partial(learning_rate, schedule)
    clip = optax.clip_by_global_norm(train.clip_norm)
    groups = jax.tree.map(lambda role: role if role == "predictor" else "other", roles)
    return optax.chain(
        optax.partition({"predictor": clip, "other": clip}, groups),
        optax.adamw(
            rate, train.b1, train.b2, train.eps, weight_decay=train.weight_decay, mask=decays
        ),
    )


def gradient_norm(grads: Any, roles: Any) -> jax.Array:
    """Returns the global norm of the gradients, without those of predictors."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(roles), strict=True)
    return optax.tree.norm([grad for grad, role in pairs if role != "predictor"])
