"""Routers in training: predictors apart, thresholds measured, capacity counted."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from modjax.specs import Execution, MoD, Predictor
from modjax.training import loop
from tests.training.tiny import (
    initial_state,
    model,
    one_device_step,
    random_batch,
    run_spec,
    train_config,
)

ROUTED = model(layers=(MoD(capacity=0.25),), num_layers=1)
PREDICTED = dataclasses.replace(ROUTED, layers=(MoD(capacity=0.25, causal=Predictor()),))


def three_steps(config, drop=()):
    """Returns the states before and after, and each step's metrics, while clipping is active."""
    train = train_config(clip_norm=0.05, warmup_steps=0)
    step = one_device_step(config, train)
    state = initial_state(PREDICTED)
    for name in drop:
        del state.params["stack"]["blocks"]["0_mod"][name]
        for moments in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")):
            if hasattr(moments, "mu"):
                for tree in (moments.mu, moments.nu):
                    del tree["stack"]["blocks"]["0_mod"][name]
    before = jax.device_get(state)
    metrics = []
    for seed in range(3):
        state, found = step(state, random_batch(seed, 8, 32))
        metrics.append(jax.device_get(found))
    return before, jax.device_get(state), metrics


@pytest.fixture(scope="module")
def predicted():
    return three_steps(PREDICTED)


def test_training_a_predictor_changes_nothing_else(predicted):
    before, after, metrics = predicted
    _, without, plain = three_steps(ROUTED, drop=["causal"])
    for ours, theirs in zip(metrics, plain, strict=True):
        assert ours["grad_norm"] > 0.05, "clipping is active"
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    with_predictor = jax.tree.map(lambda leaf: leaf, (after.params, after.measured))  # copied
    trained = with_predictor[0]["stack"]["blocks"]["0_mod"].pop("causal")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        with_predictor,
        (without.params, without.measured),
    )
    for name, value in before.params["stack"]["blocks"]["0_mod"]["causal"].items():
        assert np.all(value != trained[name])


def test_a_threshold_is_the_mean_of_the_kth_scores_so_far(predicted):
    _, after, metrics = predicted
    kth = [np.sort(found["records"]["0_mod"].scores_BL[0], axis=1)[:, -8] for found in metrics]
    for found, expected in zip(metrics, kth, strict=True):
        np.testing.assert_allclose(found["records"]["0_mod/rule"].kth_B[0], expected, rtol=1e-6)
    threshold = after.measured["stack"]["blocks"]["0_mod"]["rule"]["threshold"]
    np.testing.assert_allclose(threshold, [[np.mean(kth)]], rtol=1e-5)


def train_flops(k):
    """Returns FLOPs of a sequence: the layer on k of 32 positions, its router and its predictor."""
    forward = 2 * k * (4 * 16 * 16 + 2 * 16 * 32) + 4 * k * k * 16 + 2 * 32 * 16 * (1 + 260)
    predictor = 2 * 32 * 4 * (16 + 1)  # its input takes no gradient
    return 3 * forward + 2 * predictor


def test_a_run_counts_its_capacity_and_is_evaluated_by_its_predictor(tiny_data_dir, tmp_path):
    spec = run_spec(layers=PREDICTED.layers, num_layers=1, steps=3, eval_sequences=8)
    record = loop.train(
        spec, Execution(data=1, log_every=1), run_dir=tmp_path, data_dir=tiny_data_dir
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    *steps, evaluation = lines
    assert [line["router/capacity"] for line in steps] == [8 / 32] * 3  # a quarter of 32 positions
    spent = 8 * train_flops(8) * np.arange(1, 4)
    assert [line["train_flops"] for line in steps] == spent.tolist()
    assert record.train_flops == spent[-1]
    assert all(
        line["loss/predictor"] > 0 and "predictor/accuracy/0_mod.0" in line for line in steps
    )

    assert record.causal_routing == "predictor"
    assert record.causal_loss == pytest.approx(record.eval_loss + record.causal_difference)
    layer = {
        name: evaluation[f"eval_causal/{name}/0_mod.0"]
        for name in ("accuracy", "capacity", "overflow")
    }
    assert layer["overflow"] == 0 and 0 < layer["accuracy"] < 1
    assert {name: record.outcome[f"causal/{name}"] for name in layer} == layer
    assert evaluation["eval_causal/accuracy"] == layer["accuracy"]
    assert evaluation["eval_causal_loss"] == record.causal_loss
