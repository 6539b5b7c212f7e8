"""Training of routers alone: frozen weights keep every bit and cost no weight gradient."""

import dataclasses

import jax
import numpy as np
import pytest

from modjax.data.batches import Batch
from modjax.flops import forward_flops, total_flops, train_flops
from modjax.specs import (
    MLP,
    Attention,
    Dense,
    Execution,
    MoD,
    ModelSpec,
    Predictor,
    Repeat,
    Seq,
    Skip,
    TrainConfig,
)
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.optimizer import make_schedule
from modjax.training.programs import abstract_batch, init_state
from modjax.training.state import abstract_model, abstract_state, joined
from modjax.training.step import make_train_step

LAYERS = (Dense(), MoD(Dense(), capacity=0.25, causal=Predictor()))
SKIP = Seq(Skip(Attention()), MLP())
MODEL = ModelSpec(
    vocab_size=260, d_model=64, num_layers=4, num_heads=4, num_kv_heads=4, d_ff=256, layers=LAYERS
)


def compiled(trained, layers=LAYERS, objective="next_token"):
    changes = {"weight_decay": 0.5, "trained": trained, "objective": objective}
    train, mesh = TrainConfig(8, 64, 10, 1e-2, 0, **changes), make_mesh(Execution(data=1))
    model = abstract_model(dataclasses.replace(MODEL, layers=layers), trained)
    with jax.set_mesh(mesh):
        state = abstract_state(mesh, model, train)
        step = jax.jit(make_train_step(model, train, layer_loop="unroll"))
        batch = abstract_batch(mesh, 8, 64)
        return mesh, model, train, step.lower(state, batch, make_schedule(train)).compile()


def batch_of(seed):
    tokens = np.random.default_rng(seed).integers(0, 260, (8, 65), dtype=np.int32)
    ones = np.ones((8, 64), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones.astype(np.float32))


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("layers, objective", [(LAYERS, "next_token"), (SKIP, "base")])
def test_only_routers_and_predictors_change_and_have_moments(layers, objective):
    mesh, model, train, step = compiled("routers", layers, objective)
    with jax.set_mesh(mesh):
        state = init_state(mesh, model, train)
        before = paths(joined(state.params, state.frozen))
        for seed in range(3):
            state, _ = step(state, put_batch(batch_of(seed), mesh), make_schedule(train))
    after = paths(joined(state.params, state.frozen))
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    routers = {path for path in before if "/router/" in path or "/causal/" in path}
    assert changed == routers and len(routers) in (2, 4)
    moments = {p for p in paths(state.opt_state) if "blocks" in p or "embed" in p}
    assert all("/router/" in path or "/causal/" in path for path in moments)


def test_frozen_parameters_cost_no_weight_gradient():
    counted = {
        trained: compiled(trained)[3].cost_analysis()["flops"] for trained in ("all", "routers")
    }
    ours = {trained: train_flops(MODEL, 64, 8, trained=trained) for trained in counted}
    assert counted["routers"] / counted["all"] == pytest.approx(
        ours["routers"] / ours["all"], rel=0.05
    )
    assert ours["routers"] < 0.72 * ours["all"]


def test_layers_before_the_first_router_need_no_gradient():
    arms = {"last": (Repeat(Dense(), times=3), Repeat(SKIP, times=1)), "all": SKIP}
    counted, ours = {}, {}
    for arm, layers in arms.items():
        counted[arm] = compiled("routers", layers)[3].cost_analysis()["flops"]
        model = dataclasses.replace(MODEL, layers=layers)
        ours[arm] = train_flops(model, 64, 8, trained="routers")
    assert counted["last"] / counted["all"] == pytest.approx(ours["last"] / ours["all"], rel=0.03)
    assert counted["last"] < 0.8 * counted["all"]
    # The base costs one more forward pass.
    base = compiled("routers", SKIP, "base")[3].cost_analysis()["flops"]
    forward = 8 * total_flops(forward_flops(model, 64))
    assert (base - counted["all"]) / forward == pytest.approx(1, abs=0.1)
