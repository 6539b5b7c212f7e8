"""Causal passes and generation on a mesh of 8 fake devices give what one device gives.

Legend: B batch, L positions, N new tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.decoding.generate import Sampling, extend, generate, resume
from modjax.nn import Routed
from modjax.specs import Dense, Execution, ModelSpec, Predictor, Skip
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.state import abstract_model, abstract_weights, joined
from tests.nn.small import behind_a_block, key_values, random_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
CUBE = Execution(data=2, fsdp=2, tensor=2)
LAYERS = behind_a_block("threshold", capacity=0.25, causal=Predictor())
CONFIG = ModelSpec(24, 16, len(LAYERS), 2, 2, 32, layers=LAYERS)
TOKENS_BL = np.random.default_rng(0).integers(0, 24, (4, 12)).astype(np.int32)
SEGMENTS_BL = np.repeat([[1, 2, 0]] * 4, [5, 6, 1], axis=1)
# Ragged prompts, and a second turn of which row 2 gets nothing.
PROMPTS_B, TURNS_B = np.array([6, 1, 3, 5]), np.array([2, 1, 0, 2])
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    """A model without its arrays, and its weights on the host."""
    return abstract_model(CONFIG), nnx.to_pure_dict(random_model(CONFIG, std=0.5, seed=8)[1])


def on_both(model, run):
    """Returns run(graphdef, weights, put) on the mesh and on one device. `put` places a batch."""
    abstract, weights = model
    expected = jax.device_get(run(abstract.graphdef, weights, jnp.asarray))
    mesh = make_mesh(CUBE)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(mesh, abstract))
    placed = jax.device_put(weights, joined(*places))
    with jax.set_mesh(mesh):
        found = run(abstract.graphdef, placed, lambda batch: put_batch(batch, mesh))
    return found, expected


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_the_causal_call_on_2x2x2_devices_equals_one_device(model):
    @jax.jit(static_argnums=0)
    def call(graphdef, params, tokens_BL, segment_ids_BL):
        return nnx.merge(graphdef, params)(tokens_BL, segment_ids_BL, routing="threshold")

    found, expected = on_both(
        model,
        lambda graphdef, params, put: call(graphdef, params, put(TOKENS_BL), put(SEGMENTS_BL)),
    )
    assert_close(found, expected)
    assert len(found[0].sharding.device_set) == 8
    for record in (r for r in expected[1].values() if isinstance(r, Routed)):
        assert 0 < np.mean(record.selected_BL) < 1


@pytest.mark.slow
def test_rows_that_skip_on_2x2x2_devices_are_those_of_one_device():
    layers = (Skip(Dense(), unit="sequence", keys="routed"), Skip(Dense()))
    config = ModelSpec(24, 16, 2, 2, 2, 32, layers=layers)
    model = abstract_model(config), nnx.to_pure_dict(random_model(config, std=0.5, seed=3)[1])

    def draw(graphdef, params, put):
        drawn = generate(
            graphdef, params, put(TOKENS_BL), max_new_tokens=3, sampling=GREEDY, max_length=15
        )
        return drawn.tokens_BO, drawn.depths_BO, drawn.state.logits_BV

    found, expected = on_both(model, draw)
    assert_close(found, expected)
    assert 0 < np.mean(expected[1]) < 2


@pytest.mark.parametrize(
    "turns, routing",
    [(1, "predictor"), (1, "paced"), pytest.param(2, "predictor", marks=pytest.mark.slow)],
)
def test_generation_on_2x2x2_devices_equals_one_device(model, turns, routing):
    def talk(graphdef, params, put):
        drawn = generate(
            graphdef,
            params,
            put(TOKENS_BL[:, :6]),
            lengths_B=PROMPTS_B,
            max_new_tokens=3,
            max_length=12,
            routing=routing,
            slack=1.0,
            sampling=GREEDY,
        )
        state = drawn.state
        said = [drawn.tokens_BO, drawn.depths_BO, drawn.prompt_depths_BL]
        if turns == 2:
            said = jax.tree.map(np.asarray, said)
            state = extend(graphdef, params, state, put(TOKENS_BL[:, 4:6]), TURNS_B)
            second = resume(graphdef, params, state, max_new_tokens=1, sampling=GREEDY)
            said, state = [*said, second.tokens_BO, second.depths_BO], second.state
        return said, state.cache, state.logits_BV

    found, expected = on_both(model, talk)
    assert_close(found, expected)
    _, cache, logits_BV = found
    assert len(logits_BV.sharding.device_set) == 8
    assert len(key_values(cache)) == len(LAYERS)
    for held in key_values(cache):  # batch over data and fsdp, heads over tensor
        assert held.k_BGWH.sharding.shard_shape(held.k_BGWH.shape)[:2] == (1, 1)
    (_, depths_BO, prompt_depths_BL, *_), *_ = expected
    assert {0, 1} == set(depths_BO.ravel()) == set(prompt_depths_BL.ravel())


@pytest.mark.slow
def test_rows_that_a_mesh_cannot_share_out_evenly_are_drawn_all_the_same(model):
    def draw(graphdef, params, put):
        found = generate(
            graphdef,
            params,
            TOKENS_BL[:3, :6],
            lengths_B=PROMPTS_B[:3],
            max_new_tokens=2,
            routing="paced",
            sampling=GREEDY,
        )
        return found.tokens_BO, found.depths_BO, found.state.logits_BV

    assert_close(*on_both(model, draw))
