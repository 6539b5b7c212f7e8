"""AdamW with linear warm-up, a cosine that ends at the last step, clipping, decay on matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from modjax.config import TrainConfig


def learning_rate(train: TrainConfig, updates: Any) -> jax.Array:
    """The learning rate of the update that follows `updates` earlier ones.

    With t = updates + 1 counted from 1, W warm-up steps, T steps, peak p and floor f: p t / W up
    to t = W, then p (f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2) (arXiv 1608.03983, Eq. 5),
    so that the last update, t = T, uses p f.
    """
    t = jnp.asarray(updates, jnp.float32) + 1
    warmup, steps = train.warmup_steps, train.steps
    progress = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    floor = train.final_learning_rate_fraction
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return train.learning_rate * jnp.where(t <= warmup, t / max(warmup, 1), cosine)


def make_optimizer(train: TrainConfig, logical_axes: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101); only matrices decay.

    logical_axes: the logical axes of every parameter; "layers" stacks parameters and is no dim
      of a matrix.
    """
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            functools.partial(learning_rate, train),
            b1=train.b1,
            b2=train.b2,
            eps=train.eps,
            weight_decay=train.weight_decay,
            mask=is_matrix(logical_axes),
        ),
    )


def is_matrix(logical_axes: Any) -> Any:
    """Whether each parameter has two or more dims besides the stacked layers."""
    return jax.tree.map(
        lambda axes: sum(name != "layers" for name in axes) >= 2,
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
