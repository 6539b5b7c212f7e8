"""AdamW with linear warm-up, a cosine that ends at the last step, and clipping."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from modjax.spec import TrainConfig


class Schedule(NamedTuple):
    """The numbers of a TrainConfig that a compiled step takes as arguments, not as constants.

    So runs that differ in them alone share their programs. See TrainConfig for the fields.
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
    """The learning rate of the update that follows `updates` earlier ones.

    With t = updates + 1 counted from 1, W warm-up steps, T steps, peak p and floor f: p t / W up
    to t = W, then p (f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2) (arXiv 1608.03983, Eq. 5),
    so that the last update, t = T, uses p f.
    """
    t, warmup, steps = (
        x.astype(jnp.float32) for x in (updates + 1, schedule.warmup_steps, schedule.steps)
    )
    progress = jnp.clip((t - warmup) / jnp.maximum(steps - warmup, 1.0), 0.0, 1.0)
    floor = schedule.final_learning_rate_fraction
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    ramp = t / jnp.maximum(warmup, 1.0)
    return schedule.learning_rate * jnp.where(t <= warmup, ramp, cosine)


@dataclass(frozen=True)
class Role:
    """What a parameter says of itself, see modjax.nn.params."""

    name: str
    decays: bool


def optimizer_for(
    roles: Any, train: TrainConfig, schedule: Schedule
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101), of parameters with these roles.

    Predictors are clipped apart, so that training one changes nothing else.
    """
    predictors = jax.tree.map(lambda role: role.name == "predictor", roles)
    others = jax.tree.map(lambda mine: not mine, predictors)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(train.clip_norm), others),
        optax.masked(optax.clip_by_global_norm(train.clip_norm), predictors),
        optax.adamw(
            lambda updates: learning_rate(schedule, jnp.asarray(updates)),
            b1=train.b1,
            b2=train.b2,
            eps=train.eps,
            weight_decay=train.weight_decay,
            mask=jax.tree.map(lambda role: role.decays, roles),
        ),
    )


def gradient_norm(grads: Any, roles: Any) -> jax.Array:
    """Global norm of the gradient without the predictors' part."""
    kept = jax.tree.map(
        lambda role, grad: jnp.zeros_like(grad) if role.name == "predictor" else grad, roles, grads
    )
    return optax.tree.norm(kept)
