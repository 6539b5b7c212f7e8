"""Layers on a mesh of 8 fake devices: the numbers of one device, and what moves between experts."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.nn import losses
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Execution,
    ExpertChoice,
    ExpertThreshold,
    Full,
    Gemma3nAltUp,
    HyperConnection,
    Linear,
    ManifoldHyperConnection,
    MoD,
    ModelSpec,
    MoE,
    Projected,
    Recycled,
    Seq,
    SequenceAltUp,
    Skip,
    StridePool,
    TokenChoice,
)
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.state import abstract_model, abstract_weights, joined, make_init
from modjax.training.step import next_token
from tests.training.tiny import QUICK, random_batch, train_config

D, F, BATCH, LENGTH = 16, 32, 8, 16
LAYERS = {
    "top 2 with drops": Seq(Attention(), MoE(8, TokenChoice(2), capacity_factor=1.0)),
    "shared, sigmoid, no-ops": Seq(
        Attention(),
        MoE(8, TokenChoice(2, no_ops=4, scores="sigmoid"), shared=1, activation="swiglu"),
    ),
    "dropless": Seq(Attention(), MoE(8, TokenChoice(2), capacity_factor=None)),
    "expert choice": Seq(Attention(), MoE(8, ExpertChoice())),
    "threshold": Seq(Attention(), MoE(8, ExpertThreshold(2))),
    "skips": Seq(Skip(Attention(), router=Linear()), Skip(MLP(), router=Linear())),
    "staged": MoD(Seq(Attention(), MoE(8, TokenChoice(2))), capacity=0.5),
}
MESHES = {
    "experts": Execution(data=1, expert=8),
    "all axes": Execution(data=1, fsdp=2, tensor=2, expert=2),
    "no expert axis": Execution(data=2, fsdp=4),
}


def spec_of(*layers, streams=None):
    return ModelSpec(40, D, 2, 2, 2, F, layers=layers, streams=streams)


TWO = Recycled(2)
ON_STREAMS = {
    "AltUp": spec_of(AltUp(), AltUp(MoD(capacity=0.5), active=1), streams=TWO),
    "full": spec_of(AltUp(), AltUp(active=1), streams=Full(2)),
    "dynamic": spec_of(
        Seq(HyperConnection(Attention(), dynamic=True), ManifoldHyperConnection(MLP())),
        streams=TWO,
    ),
    "Gemma 3n": spec_of(Gemma3nAltUp(), streams=Projected(3)),
    "by stride": spec_of(SequenceAltUp(stride=4), StridePool(stride=3)),
}


def objective(model):
    def run(params, measured, batch):
        merged = nnx.merge(model.graphdef, joined(params, measured))
        options = {"segment_ids_BL": batch.segment_ids_BL, "key": jax.random.key(1)}
        nll_BL, records = next_token(merged, batch, **options)
        own = losses(records, nll_BL)
        return jnp.mean(nll_BL) + own, (nll_BL, own, records)

    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)


@functools.cache
def one_device(layer):
    """Returns the model, its arguments, and the loss, records and gradients of one device."""
    config = layer if isinstance(layer, ModelSpec) else spec_of(layer)
    model = abstract_model(config)
    state = jax.jit(make_init(model, train_config()), compiler_options=QUICK)(jnp.int32(0))
    measured = jax.tree.map(lambda x: x + 0.1, state.measured)
    arguments = state.params, measured, random_batch(0, BATCH, LENGTH, vocab=40)
    return model, arguments, objective(model)(*arguments)


def eight_devices(layer, execution):
    model, (params, measured, batch), _ = one_device(layer)
    mesh = make_mesh(execution)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(mesh, model))
    placed = jax.device_put(params, places.params)
    with jax.set_mesh(mesh):
        arguments = (placed, measured, put_batch(batch, mesh))
        compiled = objective(model).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


@pytest.mark.parametrize(
    "layer, execution",
    [
        *((layer, MESHES["all axes"]) for layer in LAYERS.values()),
        (ON_STREAMS["AltUp"], MESHES["all axes"]),
        *(
            pytest.param(ON_STREAMS[name], MESHES["all axes"], marks=pytest.mark.slow)
            for name in ("full", "dynamic", "Gemma 3n", "by stride")
        ),
        (LAYERS["top 2 with drops"], MESHES["experts"]),
        (LAYERS["dropless"], MESHES["no expert axis"]),
    ],
)
def test_eight_devices_compute_what_one_does(layer, execution):
    one, (eight, _) = one_device(layer)[2], eight_devices(layer, execution)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_slots_travel_to_their_expert_and_back_and_nothing_else_of_theirs_moves():
    layer = LAYERS["top 2 with drops"]
    _, text = eight_devices(layer, MESHES["experts"])
    sent = re.findall(r"= (\(.*?\)|\S+) all-to-all\(", text)
    shapes = [re.findall(r"f32\[([\d,]+)\]", of) for of in sent]
    numbers = [sum(math.prod(map(int, s.split(","))) for s in each) for each in shapes]
    slots = 8 * layer.parts[1].slots(LENGTH) * D * BATCH // 8  # of one device
    # There and back in two layers, and the same in the gradient.
    assert numbers == [slots] * 8
    gathered = collections.Counter(re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text))
    assert not any(shape.endswith(f"{D},{F}") for shape in gathered)  # no expert's weights


def test_experts_that_the_axis_does_not_divide_are_refused_in_one_line():
    model = abstract_model(spec_of(Seq(Attention(), MoE(6))))
    with pytest.raises(InputError, match=r"execution.expert = 4: must divide 6, the experts dim"):
        abstract_weights(make_mesh(Execution(data=2, expert=4)), model)
