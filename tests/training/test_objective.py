"""Objectives of a train step: next tokens in chunks, and one from outside the model.

Legend: B batch, L positions, D width, V vocabulary.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from modjax.errors import InputError
from modjax.nn import in_chunks
from modjax.nn.layers import ends
from modjax.specs import MLP, Execution, Tied
from modjax.specs.fields import canonical
from modjax.training.optimizer import make_schedule
from modjax.training.state import abstract_model, joined
from modjax.training.step import OBJECTIVES, make_eval_step, make_train_step
from tests.training.test_sharding import compile_step, count_collectives
from tests.training.tiny import QUICK, initial_state, model, random_batch, run_spec, train_config

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


class Scaled(nnx.Module):
    """A model with the features u x, and x under the routing "all", where x is from a table."""

    def __init__(self, u, x_VD, w_DV):
        self.config = SimpleNamespace(vocab_size=w_DV.shape[1])
        self.u, self.x_VD, self.w_DV = nnx.Param(u), nnx.Param(x_VD), nnx.Param(w_DV)

    def features(self, inputs_BL, *, routing="trained"):
        x_BLD = self.x_VD[...][inputs_BL]
        return (x_BLD if routing == "all" else self.u[...] * x_BLD), {"seen": routing}

    @property
    def head(self):
        w_DV = self.w_DV[...]
        return jax.tree_util.Partial(lambda w_DV, x_BLD: x_BLD @ w_DV, w_DV)


@pytest.mark.parametrize("most", [ends.MOST_NUMBERS, 2 * 3 * 2 * 7])
def test_the_base_is_the_model_under_all_and_gets_no_gradient(most, monkeypatch):
    monkeypatch.setattr(ends, "MOST_NUMBERS", most)
    rng = np.random.default_rng(0)
    x_VD, w_DV = (rng.normal(size=size).astype(np.float32) for size in ((7, 5), (5, 7)))
    inputs_BL, weight_BL = rng.integers(0, 7, (2, 11)), rng.normal(size=(2, 11))
    graphdef, weights = nnx.split(Scaled(jnp.float32(0.4), jnp.array(x_VD), jnp.array(w_DV)))

    def summed(weights):
        batch = SimpleNamespace(inputs_BL=jnp.array(inputs_BL))
        loss_BL, records = OBJECTIVES["base"](nnx.merge(graphdef, weights), batch)
        assert records == {"seen": "trained"}
        return jnp.sum(loss_BL * weight_BL.astype(np.float32)), loss_BL

    grads, loss_BL = jax.jit(jax.grad(summed, has_aux=True))(weights)
    x_BLD = x_VD.astype(np.float64)[inputs_BL]
    ours_BLV, base_BLV = (softmax(u * x_BLD @ w_DV, axis=-1) for u in (0.4, 1.0))
    kl_BL = np.sum(base_BLV * np.log(base_BLV / ours_BLV), axis=-1)
    np.testing.assert_allclose(loss_BL, kl_BL, rtol=1e-4, atol=1e-6)
    error_BLV = weight_BL[..., None] * (ours_BLV - base_BLV)  # the gradient of our logits
    expected_VD = np.zeros_like(x_VD)
    np.add.at(expected_VD, inputs_BL, 0.4 * error_BLV @ w_DV.T)
    expected_DV = np.einsum("BLD,BLV->DV", 0.4 * x_BLD, error_BLV)
    expected = {"u": np.sum(x_BLD * (error_BLV @ w_DV.T)), "x_VD": expected_VD, "w_DV": expected_DV}
    for name, gradient in nnx.to_pure_dict(grads).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_an_objective_without_its_base_is_refused():
    routers = train_config(objective="base", trained="routers")
    with pytest.raises(InputError, match=r"train\.objective = 'base': needs a layer with the rout"):
        dataclasses.replace(run_spec(), train=routers)
    with pytest.raises(
        InputError, match=r"train\.objective = 'base': needs train.trained = 'routers"
    ):
        train_config(objective="base")
    with pytest.raises(
        InputError, match=r"train\.objective = 'kl': must be one of next_token, base"
    ):
        train_config(objective="kl")


def test_the_name_of_a_run_has_no_objective_unless_it_is_another():
    assert "objective" not in canonical(run_spec())["train"]
