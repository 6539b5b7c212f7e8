"""Experts in training: measured numbers move once per update, and a record reports the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.records import read_record
from modjax.specs import (
    Attention,
    Binary,
    Dense,
    Execution,
    ExpertThreshold,
    MoD,
    MoE,
    Predictor,
    Seq,
    TokenChoice,
)
from modjax.training.loop import train
from modjax.training.optimizer import make_schedule
from modjax.training.state import abstract_model, make_init
from modjax.training.step import make_train_step
from tests.training.tiny import (
    initial_state,
    model,
    one_device_step,
    random_batch,
    run_spec,
    train_config,
)

BIASED = MoE(4, TokenChoice(2, bias_rate=0.125, balance=0.0))


def measured_after(layers, accumulation=1):
    config = model(layers=layers)
    before = initial_state(config)
    old = jax.tree.map(np.array, before.measured)
    batch = random_batch(0, 8, 32)
    state, metrics = one_device_step(config, train_config(accumulation=accumulation))(before, batch)
    return old, jax.tree.map(np.array, state.measured), metrics


@pytest.mark.parametrize(
    "layers, path",
    [
        ((Seq(Attention(), BIASED),), ("0_seq", "parts", "1_moe", "rule")),
        pytest.param(
            (Dense(), MoD(Seq(Attention(), BIASED), capacity=0.5)),
            ("1_mod", "inner", "parts", "1_moe", "rule"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "staged"],
)
def test_a_bias_moves_by_its_rate_once_per_update_however_the_batch_is_split(layers, path):
    found = {}
    for parts in (1, 2):
        _, measured, _ = measured_after(layers, parts)
        of = measured["stack"]["blocks"]
        for name in path:
            of = of[name]
        found[parts] = of["bias"]
        assert set(np.unique(np.abs(of["bias"]))) <= {0.0, 0.125} and np.any(of["bias"])
    np.testing.assert_array_equal(found[1], found[2])


UNEVEN = np.array([32, 5, 20, 9, 32, 2, 14, 27])  # positions of each row that are no padding
BALANCED = MoE(4, TokenChoice(2, balance=0.5, z=0.3), capacity_factor=1.0)
TOKENS = {"rule": Binary(0.5, 0.3), "capacity": 0.5}


@pytest.mark.parametrize(
    "layers",
    [
        (Seq(Attention(), BALANCED),),
        pytest.param((Dense(), MoD(**TOKENS)), marks=pytest.mark.slow),
        pytest.param(
            (Dense(), MoD(Seq(Attention(), BALANCED), causal=Predictor(), **TOKENS)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["experts", "token choice", "staged"],
)
def test_a_batch_in_parts_has_the_gradient_of_the_whole_one(layers):
    # Faults: a share of picks, or a number of positions, of each part by itself.
    config, batch = model(layers=layers), random_batch(0, 8, 32)
    valid_BL = np.arange(32) < UNEVEN[:, None]
    segments_BL = np.where(valid_BL, batch.segment_ids_BL, 0)
    batch = batch._replace(segment_ids_BL=segments_BL, weights_BL=batch.weights_BL * valid_BL)
    found = {}
    for parts in (1, 2, 4):
        train = train_config(accumulation=parts, document_mask=True, clip_norm=1e9)
        state, _ = one_device_step(config, train)(initial_state(config), batch)
        # The first moment is 1 - b1 times the gradient.
        found[parts] = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    for parts in (2, 4):
        for ours, theirs in zip(found[parts], found[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(("weight", "passes"), [(0.1, 2), (0.0, 1)])
def test_a_batch_is_read_twice_only_where_a_loss_needs_the_whole_of_it(weight, passes):
    layers = (Seq(Attention(), MoE(4, TokenChoice(balance=weight, z=0.0))),)
    split, train = abstract_model(model(layers=layers)), train_config(accumulation=2)
    state = jax.eval_shape(make_init(split, train), np.int32(0))
    arguments = state, random_batch(0, 8, 32), make_schedule(train)
    text = str(jax.make_jaxpr(make_train_step(split, train))(*arguments))
    assert text.count("length=2\n") == passes  # scans over the two parts


def test_thresholds_of_experts_are_measured_from_the_first_update():
    layers = (Seq(Attention(), MoE(4, ExpertThreshold(2))),)
    old, new, metrics = measured_after(layers)
    (before,), (after,) = jax.tree.leaves(old), jax.tree.leaves(new)
    assert not before.any() and ((0.1 < after) & (after < 0.9)).all()
    assert jnp.isfinite(metrics["loss"])


def test_a_run_with_experts_tells_of_its_picks_and_of_its_loss_without_drops(
    tmp_path, tiny_data_dir
):
    layers = (Seq(Attention(), MoE(4, TokenChoice(no_ops=4), capacity_factor=1.0)),)
    spec = run_spec(layers=layers)
    record = train(spec, Execution(data=1), run_dir=tmp_path, data_dir=tiny_data_dir)
    assert record == read_record(tmp_path) and record.causal_routing == "token_choice"
    no_op, dropped, useful = (
        record.outcome[f"trained/moe/{name}"] for name in ("no_op", "dropped", "useful")
    )
    assert 0 < no_op < 1 and 0 <= dropped < 1 and 0 < useful <= 1
    assert record.outcome["causal/moe/dropped"] == 0
    assert record.causal_difference != 0 and abs(record.causal_difference) < 0.5
    assert not any("near_ties" in name for name in record.outcome) and record.eval_batch_size == 8
    assert record.flops["experts"] > 0 and record.params_active < record.params_non_embedding
