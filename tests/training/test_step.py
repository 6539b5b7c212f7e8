"""The train step: its loss, accumulation, donation, masks and divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.specs import Dense, MoD, Predictor, Random, TopK
from modjax.training.state import abstract_model, joined
from modjax.training.step import make_eval_step
from tests.training.tiny import (
    QUICK,
    initial_state,
    model,
    one_device_step,
    random_batch,
    train_config,
)

# With the losses of routers, which are minimised and not reported.
ROUTED = model(layers=(Dense(), MoD(capacity=0.25, rule=TopK(auxiliary=0.5), causal=Predictor())))


@pytest.fixture(scope="module")
def step():
    return one_device_step(ROUTED, train_config(document_mask=True))


def test_loss_is_the_weighted_mean_of_numpy_cross_entropy(step):
    state = initial_state(ROUTED)
    split = abstract_model(ROUTED)
    batch = random_batch(0, 8, 32)
    weights = joined(state.params, state.measured)
    inputs = batch.inputs_BL, batch.segment_ids_BL
    forward = jax.jit(
        lambda weights: nnx.merge(split.graphdef, weights)(*inputs)[0], compiler_options=QUICK
    )
    logits_BLV = np.asarray(forward(weights), np.float64)
    total, count = 0.0, 0.0
    for b in range(8):
        for i in range(32):
            z = logits_BLV[b, i]
            nll = np.log(np.sum(np.exp(z - z.max()))) + z.max() - z[batch.targets_BL[b, i]]
            total += batch.weights_BL[b, i] * nll
            count += batch.weights_BL[b, i]

    eval_step = make_eval_step(split.graphdef, train_config(document_mask=True))
    sums_B, weights_B, _ = jax.jit(eval_step, compiler_options=QUICK)(
        weights, batch, jnp.int32(0), jnp.int32(0)
    )
    assert float(jnp.sum(sums_B)) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(weights_B, batch.weights_BL.sum(axis=1))
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_targets_of_weight_zero_change_nothing(step):
    batch = random_batch(1, 8, 32)
    changed = batch.targets_BL.copy()
    changed[batch.weights_BL == 0] = 7
    one, _ = step(initial_state(ROUTED), batch)
    other, _ = step(initial_state(ROUTED), batch._replace(targets_BL=changed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_segments_matter_with_a_document_mask_only(step):
    batch = random_batch(2, 8, 32)
    one_segment = batch._replace(segment_ids_BL=np.ones_like(batch.segment_ids_BL))
    blind = one_device_step(ROUTED, train_config(document_mask=False))

    def loss(step, batch):
        return float(step(initial_state(ROUTED), batch)[1]["loss"])

    assert loss(step, batch) != loss(step, one_segment)
    assert loss(blind, batch) == loss(blind, one_segment)


def test_the_state_is_donated(step):
    state = initial_state(ROUTED)
    step(state, random_batch(0, 8, 32))
    donated = jax.tree.leaves((state.params, state.measured, state.opt_state))
    assert all(leaf.is_deleted() for leaf in donated)


def test_accumulated_micro_batches_equal_the_full_batch(step):
    split = one_device_step(ROUTED, train_config(document_mask=True, accumulation=4))
    batch = random_batch(3, 8, 32)
    one, metrics = step(initial_state(ROUTED), batch)
    other, accumulated = split(initial_state(ROUTED), batch)
    assert float(accumulated["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(accumulated["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    # The first moment is 1 - b1 times the clipped gradient.
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    assert metrics["records"]
    np.testing.assert_array_equal(
        metrics["records"]["1_mod"].selected_BL, accumulated["records"]["1_mod"].selected_BL
    )


def test_the_first_step_that_is_not_finite_is_kept(step):
    state, metrics = step(initial_state(ROUTED), random_batch(0, 8, 32))
    assert int(metrics["diverged_step"]) == 0
    broken = state.params | {
        "unembed": {"w_logits": state.params["unembed"]["w_logits"].at[0, 0].set(jnp.inf)}
    }
    state = state._replace(params=broken)
    for _ in range(2):
        state, metrics = step(state, random_batch(0, 8, 32))
    assert int(metrics["diverged_step"]) == 2
    assert int(state.step) == 3


def test_stochastic_routing_draws_anew_every_step_and_the_same_in_a_rerun():
    config = model(layers=(MoD(capacity=0.25, rule=Random()),))
    step = one_device_step(config, train_config())

    def selections():
        state, masks = initial_state(config), []
        for _ in range(2):
            state, metrics = step(state, random_batch(0, 8, 32))
            masks.append(np.asarray(metrics["records"]["0_mod"].selected_BL))
        return masks

    (first, second), (again, _) = selections(), selections()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_the_seed_decides_the_initial_parameters():
    states = initial_state(ROUTED, 0), initial_state(ROUTED, 1)
    one, other = (state.params for state in states)
    for state in states:  # thresholds and lines of predictors start alike
        assert not np.any(state.measured["stack"]["blocks"]["1_mod"]["rule"]["threshold"])
        block = state.params["stack"]["blocks"]["1_mod"]
        np.testing.assert_array_equal(block["causal"].pop("line"), [[1, 0]])
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert np.all(np.asarray(a) == 1) or not np.array_equal(a, b)
