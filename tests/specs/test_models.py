"""Models name the rules that they have, and each routed layer has a capacity of its own."""

import dataclasses

import pytest

from modjax.errors import InputError
from modjax.specs import (
    MLP,
    Attention,
    Binary,
    Dense,
    ExpertChoice,
    MoD,
    ModelSpec,
    MoE,
    Positional,
    Predictor,
    Random,
    Seq,
    Sinusoids,
    Threshold,
    TopK,
)
from tests.specs.small import BY_RECEIVED, MODEL, RECEIVED

PREDICTED = dataclasses.replace(BY_RECEIVED, causal=Predictor(0.1))


def capacity_and_room(model):
    return tuple(
        (layer.capacity, layer.rule.slot_share(layer.capacity))
        for layer in model.layers
        if isinstance(layer, MoD)
    )


def test_each_layer_of_a_pattern_has_a_capacity_of_its_own():
    model = ModelSpec(**MODEL | {"layers": (Dense(), MoD(), Dense(), MoD(capacity=0.5))})
    assert capacity_and_room(model) == ((0.125, 0.125), (0.5, 0.5))
    assert model.routed() == 2


def test_a_threshold_layer_has_room_for_its_slack_and_never_for_more_than_all():
    layers = (
        MoD(rule=Threshold(slack=1.5), capacity=0.5),
        MoD(rule=Threshold(), capacity=0.8),
        MoD(capacity=0.5),
    )
    model = ModelSpec(**MODEL | {"layers": layers, "num_layers": 3})
    assert capacity_and_room(model) == ((0.5, 0.75), (0.8, 1.0), (0.5, 0.5))


def routed(*layers):
    return ModelSpec(**MODEL | {"layers": layers})


EXPERTS = Seq(Attention(), MoE(4, ExpertChoice()))

# Layers, the names of rules that a call may ask for, and the rules that "causal" routing uses.
WHAT_EACH_CAN = [
    ((Dense(),), (), ()),
    ((MoD(),), ("threshold",), ("threshold",)),
    ((MoD(rule=TopK(auxiliary=0.1)),), ("auxiliary", "threshold"), ("auxiliary",)),
    ((MoD(causal=Predictor(0.1)),), ("paced", "predictor", "threshold"), ("predictor",)),
    ((MoD(rule=Random()),), ("threshold",), ("threshold",)),
    (
        (MoD(router=Sinusoids(), causal=Predictor()),),
        ("paced", "predictor", "threshold"),
        ("predictor",),
    ),
    # The scores look ahead: only a rule that does not read them can select.
    ((RECEIVED, BY_RECEIVED), None, None),
    ((RECEIVED, PREDICTED), ("paced", "predictor"), ("predictor",)),
    ((MoD(rule=Positional()),), ("positional",), ("positional",)),
    ((MoD(rule=Binary()),), ("binary",), ("binary",)),
    ((MoD(rule=Binary(), causal=Predictor()),), ("binary", "paced", "predictor"), ("predictor",)),
    ((MoD(rule=Threshold()),), ("threshold",), ("threshold",)),
    (
        (Seq(MoD(causal=Predictor(0.1)), MLP()),),
        ("paced", "predictor", "threshold"),
        ("predictor",),
    ),
    # Each layer has a rule of its own: no other layer takes it away.
    (
        (MoD(causal=Predictor()), MoD(rule=Positional())),
        ("paced", "positional", "predictor", "threshold"),
        ("positional", "predictor"),
    ),
    ((Seq(Attention(), MoE(4)),), ("token_choice",), ("token_choice",)),
    ((EXPERTS,), None, None),
    ((MoD(EXPERTS, causal=Predictor()),), None, None),
    (
        (MoD(MoD(causal=Predictor()), causal=Predictor()),),
        ("paced", "predictor", "threshold"),
        ("predictor",),
    ),
]


@pytest.mark.parametrize("layers, names, own", WHAT_EACH_CAN)
def test_a_model_names_the_rules_that_it_has_and_refuses_others(layers, names, own):
    model = routed(*layers)
    assert model.causal_routing() == (None if own is None else "causal" if own else "trained")
    if own is not None:
        assert tuple(sorted(model.rules("causal"))) == own
    for routing in ("trained", "causal", "auxiliary", "predictor", "paced", "threshold", "best"):
        if routing == "trained" or (names is not None and routing in ("causal", *names)):
            model.check_routing(routing, "routing")
            continue
        with pytest.raises(InputError) as caught:
            model.check_routing(routing, "routing")
        message = str(caught.value)
        assert message.startswith(f"routing = '{routing}': ") and "\n" not in message
        if names is None:
            assert f"{layers[-1]} has no rule that never looks ahead" in message
        else:
            assert f"must be one of {', '.join(('trained', 'causal', *names))}" in message
