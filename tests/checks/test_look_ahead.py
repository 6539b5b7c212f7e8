"""The probe finds layers that look ahead, in time or into another sequence, and no others.

Legend: B batch, L positions, D model width.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from modjax.checks.look_ahead import alone, broken, probe
from modjax.errors import InputError
from modjax.nn import LayerModule, Out, make_param, register
from modjax.specs import (
    MLP,
    Attention,
    Cost,
    Dense,
    ExpertChoice,
    Layer,
    MoD,
    ModelSpec,
    MoE,
    Predictor,
    Received,
    Seq,
    TopK,
)

RECEIVED = Seq(Attention(received=True), MLP())


@dataclasses.dataclass(frozen=True)
class Mixing(Layer):
    """Adds a gated mix of other positions: "before" each, its "block" of four, or the "batch"."""

    over: str = "before"
    width: int = 0  # the one that it works with; 0: any
    honest: bool = False

    def cost(self, shape, load):
        yield Cost("mixing", params=1)

    def looks_ahead(self, routing):
        return self.honest


class MixingModule(LayerModule):
    def __init__(self, spec, shape, *, rngs):
        if spec.width not in (0, shape.d_model):
            raise ZeroDivisionError("a user's own error")
        self.spec = spec
        # At its start the layer adds nothing, whatever it looks at.
        self.gate = make_param(jnp.zeros(1), ("replicated",))

    def __call__(self, x_BLD, at, call, cache=None):
        batch, length, width = x_BLD.shape
        if self.spec.over == "before":
            mixed_BLD = jnp.cumsum(x_BLD, axis=1) / length
        elif self.spec.over == "batch":
            mixed_BLD = jnp.broadcast_to(jnp.mean(x_BLD, axis=0, keepdims=True), x_BLD.shape)
        else:
            mean = jnp.mean(x_BLD.reshape(batch, length // 4, 4, width), axis=2)
            mixed_BLD = jnp.repeat(mean, 4, axis=1)
        return Out(x_BLD + self.gate[...][0] * mixed_BLD)


@pytest.fixture(autouse=True)
def registered(own_layers):
    register(Mixing, MixingModule)


def model(*layers, **shape):
    numbers = {"vocab_size": 60, "d_model": 24, "num_heads": 2, "num_kv_heads": 2, "d_ff": 48}
    return ModelSpec(**numbers | shape, num_layers=len(layers), layers=layers)


def leaks(layer, *before):
    """Returns, by routing, whether the probe found that the layer looks ahead."""
    (one,) = (m for m in alone([model(*before, layer)]) if m.layers[-1] == layer)
    return {found.routing: found.leak is not None for found in probe(one, 16)}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (Mixing("before"), False),
        (Mixing("block"), True),  # the last token's block may be its own: every token is edited
        (Mixing("batch"), True),
    ],
)
def test_a_layer_from_outside_is_seen_to_look_ahead_behind_a_gate_of_zero(layer, expected):
    found = leaks(layer)
    assert set(found) == {"trained", "causal"}
    assert set(found.values()) == {expected}


def test_what_modjax_trains_by_is_seen_and_what_it_claims_holds():
    expert_choice = MoD(Dense(), capacity=0.5, causal=Predictor())
    assert leaks(expert_choice) == {
        "trained": True,
        "causal": False,
        "predictor": False,
        "paced": False,
        "threshold": False,
    }
    assert leaks(MoE(2, ExpertChoice())) == {"trained": True}
    received = MoD(
        MLP(), capacity=0.5, router=Received(), rule=TopK(weight="one"), causal=Predictor()
    )
    assert leaks(received, RECEIVED) == {
        "trained": True,
        "causal": False,
        "predictor": False,
        "paced": False,
    }


def test_only_a_broken_claim_is_an_error_and_names_layer_routing_and_what_moved():
    (found,) = probe(model(Mixing("block", honest=True)), 16)
    assert found.leak is not None and broken(found) is None
    found = probe(model(MoD(Mixing("block"), capacity=0.5)), 16)[-1]
    assert found.routing == "threshold"
    said = str(broken(found))
    assert r"model.layers = \"MoD(Mixing(over='block'), capacity=0.5)\"" in said.replace('"', '\\"')
    assert "looks ahead under routing 'threshold', where it claims not to: an edit of " in said


def test_a_layer_that_wants_its_own_shape_gets_it_and_one_that_runs_in_neither_is_named():
    assert leaks(Mixing("block", width=24))["trained"]
    with pytest.raises(InputError, match=r"Mixing\(width=7\).*ZeroDivisionError: a user's own"):
        probe(model(Mixing(width=7)), 16)


def test_equal_layers_are_probed_once_with_what_they_need_before_them():
    routed = MoD(Dense(), router=Received(), rule=TopK(weight="one"))
    models = [model(Dense(), RECEIVED, routed), model(RECEIVED, routed, d_model=48), model(Dense())]
    assert [m.layers for m in alone(models)] == [(Dense(),), (RECEIVED,), (RECEIVED, routed)]


@dataclasses.dataclass(frozen=True)
class Passing(Layer):
    """Needs one value of an earlier layer, and passes another one on."""

    needed: str = ""
    passed: str = ""

    def needs(self):
        return frozenset({self.needed} - {""})

    def passes_on(self):
        return frozenset({self.passed} - {""})


def test_a_layer_is_probed_behind_all_that_those_before_it_need():
    first, second, last = Passing("", "a"), Passing("a", "b"), Passing("b")
    chain = model(first, Dense(), second, last)
    assert alone([chain])[-1].layers == (first, second, last)
