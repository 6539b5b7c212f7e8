"""Small blocks and models for tests, and how they are compiled.

Legend: B batch, L positions, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import MoDBlock, Transformer
from modjax.nn.cache import KVCache
from modjax.specs import (
    MLP,
    Attention,
    Binary,
    Dense,
    Layer,
    MoD,
    MoDConfig,
    ModelSpec,
    Positional,
    Predictor,
    Random,
    Received,
    Seq,
    Sinusoids,
    Threshold,
    TopK,
)

# Tests run each program once or twice: optimising it costs more than it saves.
QUICK = {"xla_backend_optimization_level": 0}
WIDTH = 8
# Every way to select, as changes of a MoD.
SCHEMES: dict[str, dict[str, Any]] = {
    "received": {"router": Received(), "rule": TopK("one")},
    "expert_choice": {},
    "stochastic": {"rule": Random()},
    "positional": {"rule": Positional()},
    "learned_position": {"router": Sinusoids()},
    "binary": {"rule": Binary()},
    "threshold": {"rule": Threshold()},
}
EVERY = tuple(SCHEMES)
# By causal routing, every way that knows it: one program tests them all. "causal": no predictor.
KINDS = {
    "predictor": EVERY,
    "paced": EVERY,
    "threshold": ("expert_choice", "stochastic", "learned_position", "threshold"),
    "auxiliary": ("expert_choice", "learned_position"),
    "causal": EVERY[1:],
}
# A block that passes on the attention that its positions received.
RECEIVED = Seq(Attention(received=True), MLP())


def scheme(name: str, *, auxiliary: float = 0.0, **options: Any) -> MoD:
    """Returns a MoD of SCHEMES. auxiliary: weight of the auxiliary loss of rules that have one."""
    changes = SCHEMES[name]
    rule = changes.get("rule", TopK())
    if isinstance(rule, TopK):
        rule = dataclasses.replace(rule, auxiliary=auxiliary)
    return MoD(Dense(), **{**changes, "rule": rule, **options})


def behind_a_block(*names: str, **options: Any) -> tuple[Layer, ...]:
    """Returns a pattern: a dense block, and a MoD for each name of SCHEMES."""
    first = RECEIVED if "received" in names else Dense()
    return (first, *(scheme(name, **options) for name in names))


def taught(routing: str, **options: Any) -> tuple[Layer, ...]:
    """Returns a pattern of every scheme that a causal routing knows, with its losses."""
    causal = None if routing == "causal" else Predictor()
    return behind_a_block(*KINDS[routing], auxiliary=1.0, causal=causal, **options)


def key_values(caches: Any) -> list[KVCache]:
    """Returns the caches of all attention layers, in order."""
    leaves = jax.tree.leaves(caches, is_leaf=lambda node: isinstance(node, KVCache))
    return [leaf for leaf in leaves if isinstance(leaf, KVCache)]


class Mixer(nnx.Module):
    """Inner block in float32 whose positions depend on each other: x + tanh(mean so far) w."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)) / 3)

    def __call__(self, x_BLD):
        x_BLD = x_BLD.astype(jnp.float32)
        count_1L1 = jnp.arange(1.0, x_BLD.shape[1] + 1)[None, :, None]
        return x_BLD + jnp.tanh(jnp.cumsum(x_BLD, axis=1) / count_1L1) @ self.w


def mod_block(**config) -> MoDBlock:
    """Returns a MoDBlock around a Mixer."""
    rngs = nnx.Rngs(0)
    return MoDBlock(Mixer(rngs), WIDTH, MoDConfig(**config), rngs=rngs)


def stream(seed: int = 0, batch: int = 3, length: int = 16, width: int = WIDTH) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, width))


@functools.cache
def build(config: ModelSpec) -> tuple[Any, Any]:
    """Returns graph definition and parameters, made in one jit: eager ops compile one by one."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef = nnx.split(model)[0]
    make = jax.jit(
        lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1],
        compiler_options=QUICK,
    )
    return graphdef, make()


def random_model(config: ModelSpec, *, std: float = 0.3, seed: int = 0) -> tuple[Any, Any]:
    """Returns graph definition and parameters from N(0, std^2), thresholds too, without a jit."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    rng = np.random.default_rng(seed)
    draw = jax.tree.map(lambda leaf: rng.normal(0, std, leaf.shape).astype(np.float32), shapes)
    return graphdef, draw


def check_gradients(
    loss: Callable[..., float], arguments: Any, gradients: Any, rng: np.random.Generator
) -> None:
    """Compares gradients with differences of a float64 loss, along a direction for every leaf."""
    leaves, structure = jax.tree.flatten(arguments)
    for index, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.normal(size=gradient.shape)
        up, down = (
            loss(
                *jax.tree.unflatten(
                    structure,
                    [
                        leaf + step * direction if i == index else leaf
                        for i, leaf in enumerate(leaves)
                    ],
                )
            )
            for step in (1e-6, -1e-6)
        )
        slope = (up - down) / 2e-6
        assert abs(slope) > 1e-3
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-4, abs=1e-4)
