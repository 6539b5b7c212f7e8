"""What training does with routers: predictors apart, thresholds measured, capacity scheduled."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from modjax.spec import Execution, MoDConfig
from modjax.training import loop
from tests.training.tiny import (
    initial_state,
    model,
    one_device_step,
    random_batch,
    run_spec,
    train_config,
)

ROUTED = model(pattern=("mod",), num_layers=1)
PREDICTED = dataclasses.replace(ROUTED, mod=MoDConfig(capacity=0.25, predictor_weight=1.0))


def three_steps(config, drop=()):
    """Parameters before and after, and each step's metrics, under clipping that is active."""
    train = train_config(clip_norm=0.05, warmup_steps=0)
    step = one_device_step(config, train)
    state = initial_state(PREDICTED)
    for name in drop:
        del state.params["blocks"]["0_mod"][name]
        for moments in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")):
            if hasattr(moments, "mu"):
                for tree in (moments.mu, moments.nu):
                    del tree["blocks"]["0_mod"][name]
    before = jax.device_get(state.params)
    metrics = []
    for seed in range(3):
        state, found = step(state, random_batch(seed, 8, 32))
        metrics.append(jax.device_get(found))
    return before, jax.device_get(state.params), metrics


@pytest.fixture(scope="module")
def predicted():
    return three_steps(PREDICTED)


def test_training_a_predictor_changes_nothing_else(predicted):
    before, with_predictor, metrics = predicted
    _, without, plain = three_steps(ROUTED, drop=["predictor"])
    for ours, theirs in zip(metrics, plain, strict=True):
        assert ours["grad_norm"] > 0.05, "clipping is active"
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    with_predictor["blocks"]["0_mod"] = dict(with_predictor["blocks"]["0_mod"])
    trained = with_predictor["blocks"]["0_mod"].pop("predictor")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), with_predictor, without
    )
    for name, value in before["blocks"]["0_mod"]["predictor"].items():
        assert np.all(value != trained[name])


def test_a_threshold_is_the_mean_of_the_kth_scores_so_far(predicted):
    _, after, metrics = predicted
    kth = [np.sort(found["aux"]["0_mod"]["scores_BL"][0], axis=1)[:, -8] for found in metrics]
    for found, expected in zip(metrics, kth, strict=True):
        np.testing.assert_allclose(found["aux"]["0_mod"]["kth_B"][0], expected, rtol=1e-6)
    threshold = after["blocks"]["0_mod"]["threshold"]
    np.testing.assert_allclose(threshold, [[np.mean(kth)]], rtol=1e-5)


def train_flops(k):
    """Of one sequence: the block of `run_spec` on k of 32 positions, its router and predictor."""
    forward = 2 * k * (4 * 16 * 16 + 2 * 16 * 32) + 4 * k * k * 16 + 2 * 32 * 16 * (1 + 260)
    predictor = 2 * 32 * 4 * (16 + 1)  # its input takes no gradient
    return 3 * forward + 2 * predictor


def test_a_run_counts_its_capacity_and_is_evaluated_by_its_predictor(tiny_data_dir, tmp_path):
    spec = run_spec(pattern=("mod",), num_layers=1, mod=PREDICTED.mod, steps=3, eval_sequences=8)
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
    block = {
        name: evaluation[f"eval_predictor/{name}/0_mod.0"]
        for name in ("accuracy", "capacity", "overflow")
    }
    assert block["overflow"] == 0 and 0 < block["accuracy"] < 1
    assert (record.causal_accuracy, record.causal_capacity) == (
        block["accuracy"], block["capacity"],
    )  # fmt: skip
    assert evaluation["eval_causal_loss"] == record.causal_loss
