"""Objectives of a train step: next tokens in chunks, and one from outside the model.

Legend: B batch, L positions, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import in_chunks
from modjax.nn.layers import ends
from modjax.specs import MLP, Execution, Tied
from modjax.training.optimizer import make_schedule
from modjax.training.state import abstract_model, joined
from modjax.training.step import make_eval_step, make_train_step
from tests.training.test_sharding import compile_step, count_collectives
from tests.training.tiny import QUICK, initial_state, model, random_batch, train_config

LARGE = model(vocab_size=4096, num_layers=1, layers=MLP())
B, L, V = 8, 32, LARGE.vocab_size
SMALL = model(num_layers=1, layers=MLP())


def temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_of_a_step_are_never_whole_where_they_are_large(monkeypatch):
    one_device, logits = Execution(data=1), 4 * B * L * V
    whole = temporary(compile_step(LARGE, train_config(), one_device)[0])
    monkeypatch.setattr(ends, "MOST_NUMBERS", B * L * V // 8)
    chunks = temporary(compile_step(LARGE, train_config(), one_device)[0])
    assert logits < whole
    assert chunks < whole - logits * 3 / 4


@pytest.mark.parametrize("execution", [Execution(), Execution(data=2, fsdp=4)])
def test_chunks_add_no_collective_to_a_step(execution, monkeypatch):
    whole = count_collectives(compile_step(LARGE, train_config(), execution)[0])
    monkeypatch.setattr(ends, "MOST_NUMBERS", B * L * V // 64)
    chunks = count_collectives(compile_step(LARGE, train_config(), execution)[0])
    assert whole["all-reduce"] > 0
    assert chunks == whole


def to_a_base(base):
    """Returns an objective: KL(base || model) at every position, for any two heads."""

    def kl(heads, *features):
        ours_BLV, base_BLV = (
            jax.nn.log_softmax(head(x_BLD)) for head, x_BLD in zip(heads, features, strict=True)
        )
        return jnp.sum(jnp.exp(base_BLV) * (base_BLV - ours_BLV), axis=-1)

    def objective(model, batch, **options):
        x_BLD, records = model.features(batch.inputs_BL, **options)
        base_BLD, _ = base.features(batch.inputs_BL, **options)
        heads, numbers = (model.head, base.head), 2 * model.config.vocab_size
        return in_chunks(kl, heads, x_BLD, base_BLD, numbers=numbers), records

    return objective


def network(config, seed):
    """Returns a model's graph definition, its weights, and the model."""
    state = initial_state(config, seed)
    graphdef, weights = abstract_model(config).graphdef, state.params
    return graphdef, weights, nnx.merge(graphdef, joined(weights, state.measured))


@pytest.mark.parametrize("most", [ends.MOST_NUMBERS, 8 * 5 * 2 * 260])
def test_kl_to_a_base_model_is_an_objective_without_a_line_of_the_model(most, monkeypatch):
    monkeypatch.setattr(ends, "MOST_NUMBERS", most)
    config = model(num_layers=1, layers=MLP(), head=Tied(softcap=5.0))
    (_, _, base), (graphdef, weights, start) = network(SMALL, 1), network(config, 0)
    train, batch = train_config(learning_rate=0.03), random_batch(0, 8, 32)
    logs = [
        np.asarray(jax.nn.log_softmax(m(batch.inputs_BL)[0]), np.float64) for m in (start, base)
    ]
    kl_BL = np.sum(np.exp(logs[1]) * (logs[1] - logs[0]), axis=-1)

    evaluated = make_eval_step(graphdef, train, to_a_base(base))
    sums_B = jax.jit(evaluated, compiler_options=QUICK)(weights, batch, 0, 0)[0]
    np.testing.assert_allclose(sums_B, np.sum(kl_BL * batch.weights_BL, axis=1), rtol=1e-4)

    split = abstract_model(config)
    step = jax.jit(make_train_step(split, train, to_a_base(base)), compiler_options=QUICK)
    state, found = initial_state(config), []
    for _ in range(8):
        state, metrics = step(state, batch, make_schedule(train))
        found.append(float(metrics["loss"]) * int(metrics["loss_steps"]))
    losses = np.diff([0, *found])
    expected = np.sum(kl_BL * batch.weights_BL) / np.sum(batch.weights_BL)
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    # A model is no distance away from itself, and there is nowhere to go.
    itself = jax.jit(make_train_step(split, train, to_a_base(start)), compiler_options=QUICK)
    _, metrics = itself(initial_state(config), batch, make_schedule(train))
    assert abs(float(metrics["loss"])) < 1e-6 and float(metrics["grad_norm"]) < 1e-5
