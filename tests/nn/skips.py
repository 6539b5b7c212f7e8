"""Small layers and models that skip, and how they run.

Legend: B batch, L positions, D model width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.nn import At, Call
from modjax.nn import build as build_layer
from modjax.nn.routing.skipping import Skipped
from modjax.specs import ModelSpec
from tests.nn.small import random_model

D, LENGTH = 8, 14
SMALL = ModelSpec(20, D, 2, 2, 1, 16)
TOKENS_BL = np.random.default_rng(0).integers(0, 20, (3, LENGTH))


def alone(spec):
    """Returns a Skip of width D with random routers, and its weights."""
    shape = dataclasses.replace(SMALL, layers=(spec,)).shape
    graphdef, state = nnx.split(build_layer(spec, shape, rngs=nnx.Rngs(0)))
    weights = nnx.to_pure_dict(state)
    router = np.random.default_rng(1).normal(size=(D, 1)).astype(np.float32)
    weights["router"]["w"] = jnp.asarray(router)
    return graphdef, weights


@functools.partial(jax.jit, static_argnames=("graphdef", "routing"))
def run(graphdef, weights, x_BLD, routing="trained", valid_BL=None):
    batch, length, _ = x_BLD.shape
    positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
    at = At(positions_BL, None, valid_BL, {}, {})
    return nnx.merge(graphdef, weights)(x_BLD, at, Call(routing))


@functools.partial(jax.jit, static_argnames=("graphdef", "routing"))
def forward(graphdef, weights, routing="trained", segments_BL=None):
    return nnx.merge(graphdef, weights)(TOKENS_BL, segments_BL, routing=routing)


def numpy_norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + SMALL.norm_eps)


def skipping_model(*layers, seed=0, **changes):
    """Returns a model with random weights, whose routers decide by content."""
    spec = dataclasses.replace(SMALL, layers=layers, num_layers=2 * len(layers), **changes)
    return random_model(spec, seed=seed)


def decisions(records):
    return [r.selected_BL for r in records.values() if isinstance(r, Skipped)]
