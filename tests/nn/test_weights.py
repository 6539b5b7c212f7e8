"""Weights are named by the place of their layer, never by how its spec prints."""

import jax
import pytest
from flax import nnx

from modjax.nn import Transformer
from modjax.spec import (
    MLP,
    AltUp,
    Attention,
    Dense,
    MoD,
    ModelSpec,
    MoE,
    Recycled,
    Repeat,
    Seq,
    SequenceAltUp,
)

SHAPE = {"vocab_size": 40, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 32}


def model(*layers, **changes):
    places = [part for layer in layers for part in (layer.parts * layer.times if isinstance(
        layer, Repeat) else (layer,))]  # fmt: skip
    return ModelSpec(**SHAPE | changes, num_layers=len(places), layers=layers)


def paths(spec):
    network = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(network)))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


CAPPED = Seq(Attention(softcap=20.0, rope=500.0), MLP("silu"))


@pytest.mark.parametrize(
    "plain, changed",
    [
        ((Dense(),), (CAPPED,)),
        ((Dense(), MoD(Dense())), (Dense("silu"), MoD(CAPPED, capacity=0.5))),
        ((Seq(Attention(), MoE(4)),), (Seq(Attention(window=8), MoE(4, top_k=2)),)),
        ((SequenceAltUp(Dense()),), (SequenceAltUp(CAPPED, stride=2),)),
        ((Repeat(Dense(), times=2), Repeat(Attention(), times=1)),
         (Repeat(CAPPED, times=2), Repeat(Attention(norm="after"), times=1))),
    ],
)  # fmt: skip
def test_no_field_changes_the_path_of_a_parameter(plain, changed):
    named = [path.replace("norm_after", "norm") for path in paths(model(*changed))]
    assert sorted(named) == sorted(paths(model(*plain)))


def test_a_layer_is_named_by_its_place_and_its_class():
    ends = {"streams": Recycled(2)}
    found = paths(model(AltUp(Dense(), active=0), AltUp(MLP(), active=1), **ends))
    assert "stack/blocks/0_altup/inner/parts/1_mlp/w_in" in found
    assert "stack/blocks/1_altup/inner/w_in" in found
