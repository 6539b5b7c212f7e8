"""Losses of rules against plain numpy, and where their gradients go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import At, Call, TokenLoss, losses
from modjax.nn import build as build_module
from modjax.specs import Binary, Dense, MoD, ModelSpec, Predictor, Shape, TopK
from tests.nn.routing.plain import (
    CONFIG,
    LENGTH,
    VALID,
    X,
    assert_close,
    best_k,
    masked_mean,
    run_block,
    sigmoid,
)
from tests.nn.small import QUICK, build


def test_balance_loss_is_one_where_choices_and_probabilities_equal_the_capacity():
    at = At(jnp.arange(4)[None], None, None, {}, {})

    def balance(probabilities, capacity=0.25):
        shape = Shape(2, 1, 1, 1, 2, 2, 1e-6)
        rule = build_module(Binary(balance=1.0), shape, rngs=nnx.Rngs(0), capacity=capacity)
        odds = jnp.log(jnp.array([probabilities]) / (1 - jnp.array([probabilities])))
        choice = rule.choose(jnp.stack([jnp.zeros_like(odds), odds], -1), at, Call())
        return float(rule.report(odds, choice, None, at).losses["balance"][0])

    assert balance([0.7, 0.1, 0.1, 0.1]) == pytest.approx(1, rel=1e-5)
    # At capacity 1 every choice is as balanced as any other.
    assert balance([0.7, 0.1, 0.1, 0.1], 1.0) == balance([0.9, 0.9, 0.9, 0.9], 1.0) == 1
    assert balance([0.9, 0.9, 0.9, 0.9]) > balance([0.7, 0.7, 0.1, 0.1]) > 1


def plain_cross_entropy(logits, target, valid):
    p = sigmoid(logits)
    return masked_mean(-np.where(target, np.log(p), np.log(1 - p)), valid)


def test_both_losses_equal_numpy_with_targets_for_every_row():
    # Faults: auxiliary targets written without the batch offset label row 0 only.
    config = dataclasses.replace(CONFIG, rule=TopK(auxiliary=0.3))
    block, _, record = run_block("expert_choice", config=config, valid_BL=VALID)
    scores = X @ np.asarray(block.router.w[..., 0])
    target = best_k(scores, VALID)
    np.testing.assert_array_equal(record.target_BL, target)
    assert target.sum(axis=1).tolist() == [4, 3, 1]
    predictor = block.causal
    normal = X / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + 1e-6)
    hidden = normal @ np.asarray(predictor.w_in[...])
    logits = (hidden * sigmoid(hidden)) @ np.asarray(predictor.w_out[...]) + scores
    taught, own = record.own["causal"], record.own["rule"].losses
    assert_close(taught.logits_BL, logits)
    assert_close(taught.losses["predictor"], 2.0 * plain_cross_entropy(logits, target, VALID))
    assert_close(own["auxiliary"], 0.3 * plain_cross_entropy(scores, target, VALID))


def gradients_of_losses(**weights):
    """Returns the largest gradient of the rules' losses for each parameter."""
    layers = (Dense(), MoD(Dense(), capacity=0.25, **weights))
    config = ModelSpec(20, 8, 4, 2, 2, 16, layers=layers)
    graphdef, params = build(config)
    tokens = np.random.default_rng(2).integers(0, 20, (2, LENGTH))

    def own_losses(params):
        return losses(nnx.merge(graphdef, params)(tokens)[1], TokenLoss(jnp.zeros(tokens.shape)))

    grads = nnx.to_pure_dict(jax.jit(jax.grad(own_losses), compiler_options=QUICK)(params))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }


def test_the_loss_of_a_predictor_has_no_gradient_outside_of_it():
    found = gradients_of_losses(causal=Predictor())
    inside = {name for name in found if "/causal/" in name}
    assert len(inside) == 3 and all(found[name] > 0 for name in inside)
    assert {found[name] for name in found.keys() - inside} == {0.0}


def test_the_auxiliary_loss_teaches_the_router_and_never_the_threshold():
    found = gradients_of_losses(rule=TopK(auxiliary=1.0))
    assert found["stack/blocks/1_mod/router/w"] > 0
    assert found["stack/blocks/1_mod/rule/threshold"] == 0
