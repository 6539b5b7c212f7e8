"""Weights are named by the place of their layer, never by how its spec prints.

They go out as plain matrices, and in again.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.nn import Transformer
from modjax.nn.weights import named_weights, write_weights
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Causal,
    Dense,
    MoD,
    ModelSpec,
    MoE,
    Recycled,
    Repeat,
    Rope,
    Seq,
    SequenceAltUp,
    Tied,
    TokenChoice,
    Window,
)
from tests.nn.small import random_model

SHAPE = {"vocab_size": 40, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 32}


def model(*layers, **changes):
    places = [
        part
        for layer in layers
        for part in (layer.parts * layer.times if isinstance(layer, Repeat) else (layer,))
    ]
    return ModelSpec(**SHAPE | changes, num_layers=len(places), layers=layers)


def paths(spec):
    network = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(network)))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


CAPPED = Seq(Attention(softcap=20.0, rope=Rope(500.0)), MLP("silu"))


@pytest.mark.parametrize(
    "plain, changed",
    [
        ((Dense(),), (CAPPED,)),
        ((Dense(), MoD(Dense())), (Dense("silu"), MoD(CAPPED, capacity=0.5))),
        (
            (Seq(Attention(), MoE(4)),),
            (Seq(Attention(mask=Causal() & Window(8)), MoE(4, TokenChoice(2))),),
        ),
        ((SequenceAltUp(Dense()),), (SequenceAltUp(CAPPED, stride=2),)),
        (
            (Repeat(Dense(), times=2), Repeat(Attention(), times=1)),
            (Repeat(CAPPED, times=2), Repeat(Attention(norm="after"), times=1)),
        ),
    ],
)
def test_no_field_changes_the_path_of_a_parameter(plain, changed):
    named = [path.replace("norm_after", "norm") for path in paths(model(*changed))]
    assert sorted(named) == sorted(paths(model(*plain)))


def test_a_layer_is_named_by_its_place_and_its_class():
    ends = {"streams": Recycled(2)}
    found = paths(model(AltUp(Dense(), active=0), AltUp(MLP(), active=1), **ends))
    assert "stack/blocks/0_altup/inner/parts/1_mlp/w_in" in found
    assert "stack/blocks/1_altup/inner/w_in" in found


MODELS = {
    "dense": model(Dense("swiglu"), Dense("swiglu")),
    "segments, tied": model(
        Repeat(Dense(), MoD(MLP()), times=2), Repeat(Attention(), times=1), head=Tied()
    ),
    "experts": model(Dense(), MoD(Seq(Attention(), MoE(3, shared=1)))),
    "streams": model(AltUp(Dense(), active=0), AltUp(Dense(), active=1), streams=Recycled(2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_out_and_in_again_bit_for_bit(name):
    graphdef, state = random_model(MODELS[name])
    found = named_weights(nnx.merge(graphdef, state))
    other = nnx.merge(*random_model(MODELS[name], seed=1))
    write_weights(other, found)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), state)
    assert sum(matrix.size for matrix in found.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(state)
    )


def test_every_layer_and_expert_has_its_own_plain_matrices():
    graphdef, state = random_model(MODELS["experts"])
    found = named_weights(nnx.merge(graphdef, state))
    experts = nnx.to_pure_dict(state)["stack"]["blocks"]["1_mod"]["inner"]["parts"]["1_moe"]
    for expert in range(3):
        name = f"stack.blocks.1.inner.parts.1_moe.experts.{expert}"
        for matrix, stored in (("w_in", lambda w: w), ("w_out", np.transpose)):
            kept = stored(experts["experts"][matrix][0, expert])
            np.testing.assert_array_equal(found[f"{name}.{matrix}"], kept)
    graphdef, state = random_model(MODELS["segments, tied"])
    found = named_weights(nnx.merge(graphdef, state))
    blocks = nnx.to_pure_dict(state)["stack"]["blocks"]
    assert found["stack.blocks.3.inner.w_out"].shape == (32, 16)
    np.testing.assert_array_equal(
        found["stack.blocks.3.inner.w_out"].T, blocks["1_mod"]["inner"]["w_out"][1]
    )
    np.testing.assert_array_equal(
        found["stack.blocks.2.parts.1_mlp.w_in"], blocks["0_seq"]["parts"]["1_mlp"]["w_in"][1]
    )
    assert "stack.blocks.4.norm.scale" in found and "stack.blocks.5.norm.scale" not in found


def test_weights_of_another_model_are_refused():
    network = nnx.merge(*random_model(MODELS["dense"]))
    found = named_weights(network)
    for changed, said in (
        ({"embed.table": found["embed.table"][1:]}, r"weights\.embed\.table = .*must have shape"),
        ({"other": np.ones(3)}, r"weights = 'other': unknown"),
    ):
        with pytest.raises(InputError, match=said):
            write_weights(network, found | changed)
    del found["embed.table"]
    with pytest.raises(InputError, match=r"weights = 'embed\.table': missing"):
        write_weights(network, found)
