"""Causal passes and generation on a mesh of 8 fake devices give what one device gives.

Legend: B batch, L positions, N new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from modjax.config import Execution, MoDConfig, ModelConfig
from modjax.decoding.generate import Sampling, extend, generate, resume
from modjax.nn.sharding import partition_spec
from modjax.training.sharding import make_mesh, param_shardings, put_batch
from tests.nn.small import QUICK, random_model

CUBE = Execution(data=2, fsdp=2, tensor=2)
PATTERNS = {"predictor": ("dense", "mod"), "threshold": ("dense", "threshold")}
LENGTHS_B = np.array([5, 1, 3, 4])
TOKENS_BL = np.random.default_rng(0).integers(0, 24, (4, 12)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config_of(pattern):
    mod = MoDConfig(capacity=0.5, predictor_weight=1.0)
    return ModelConfig(24, 16, len(pattern), 2, 2, 32, pattern=pattern, mod=mod)


def sharded(mesh, params):
    """Parameters where training keeps them."""
    is_param = lambda node: isinstance(node, nnx.Param)  # noqa: E731
    axes = jax.tree.map(lambda param: param.out_sharding, params, is_leaf=is_param)
    values = jax.tree.map(lambda param: param.get_value(), params, is_leaf=is_param)
    print(type(params), type(axes))
    return jax.device_put(params, param_shardings(mesh, params, axes))

def talk(graphdef, params, put, routing, slack):
    """The causal pass, and a conversation of two turns."""
    greedy = Sampling(temperature=0)
    called = jax.jit(lambda params, tokens_BL, ids_BL: nnx.merge(graphdef, params)(tokens_BL, ids_BL, routing=routing, slack=slack))
    ids_BL = np.repeat([[1, 2]], [5, 7], axis=1) * np.ones((4, 1), int)
    logits_BLV, aux = called(params, *put((TOKENS_BL, ids_BL)))
    first = generate(
        graphdef, params, put(TOKENS_BL[:, :5]), lengths_B=LENGTHS_B, max_new_tokens=3,
        max_length=12, routing=routing, slack=slack, sampling=greedy,
    )
    first = jax.tree.map(jnp.copy, first)
    state = extend(graphdef, params, jax.tree.map(jnp.copy, first.state), put(TOKENS_BL[:, 5:7]), np.array([2, 1, 0, 2]))
    return logits_BLV, aux, first, resume(graphdef, params, state, max_new_tokens=2, sampling=greedy)


@pytest.mark.parametrize("routing, slack", [("predictor", None), ("threshold", 1.0)])
def test_generation_with_2x2x2_devices_equals_one_device(routing, slack):
    graphdef, params = random_model(config_of(PATTERNS[routing]), std=0.5, seed=8)
    import time; t=time.time()
    expected = talk(graphdef, params, lambda x: x, routing, slack)
    print(time.time()-t); t=time.time()
    mesh = make_mesh(CUBE)
    placed = sharded(mesh, params)
    with jax.set_mesh(mesh):
        found = talk(graphdef, placed, lambda x: put_batch(x, mesh), routing, slack)
    print(time.time()-t)
    print(jax.tree.map(lambda x: (x.shape, x.sharding.spec), found))
