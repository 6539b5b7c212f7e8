"""Experts and MoDE, read and decoded with caches: equal to the full causal pass.

Legend: B batch, L positions, S steps of decoding.
"""

import dataclasses

import numpy as np
import pytest

from modjax.errors import InputError
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Dense,
    ExpertChoice,
    ExpertThreshold,
    MoD,
    MoE,
    Predictor,
    Random,
    Recycled,
    Seq,
    SequenceAltUp,
    StridePool,
    StrideSkip,
    TokenChoice,
    TopK,
)
from tests.nn.test_cached_decoding import LENGTHS, TOTALS, both_ways, model_config

TAUGHT = {"capacity": 0.5, "rule": TopK(auxiliary=1.0), "causal": Predictor()}


def block(moe: MoE) -> Seq:
    return Seq(Attention(), moe)


MODELS = {
    "top 1": [block(MoE(4, capacity_factor=0.5))],
    "top 2": [block(MoE(4, TokenChoice(2, renormalise=True), shared=1)), Dense()],
    "sigmoid and a bias": [block(MoE(4, TokenChoice(2, scores="sigmoid", bias_rate=0.1)))],
    "dropless": [block(MoE(4, TokenChoice(2), capacity_factor=None))],
    "threshold": [block(MoE(4, ExpertThreshold(2)))],
    "integrated": [block(MoE(4, TokenChoice(2, no_ops=4)))],
    "random no-ops": [block(MoE(4, TokenChoice(2, no_ops=4, random_no_ops=True)))],
    "staged": [Dense(), MoD(block(MoE(4)), **TAUGHT)],
    "staged around integrated": [
        MoD(block(MoE(4, TokenChoice(no_ops=2))), **TAUGHT),
        block(MoE(2)),
    ],
}


def check(layers, routing, slack, **changes):
    config = model_config(*layers, **changes)
    results = both_ways(config, routing, slack, LENGTHS, TOTALS)
    (logits_BLV, masks), (first_BV, _, _), decoded, _, (later_BV, *_) = results
    logits_SBV, _, active_SB, positions_SB, _ = decoded
    assert 0.1 < np.std(logits_BLV) < 10
    for b, (length, total) in enumerate(zip(LENGTHS, TOTALS, strict=True)):
        active_S = active_SB[:, b]
        np.testing.assert_allclose(first_BV[b], logits_BLV[b, length - 1], atol=2e-5)
        np.testing.assert_allclose(later_BV[b], logits_BLV[b, total - 1], atol=2e-5)
        np.testing.assert_allclose(logits_SBV[active_S, b], logits_BLV[b, length:total], atol=2e-5)
        np.testing.assert_array_equal(positions_SB[active_S, b], np.arange(length, total))
    return masks


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in MODELS if name != "staged around integrated"),
        pytest.param("staged around integrated", marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_equals_the_full_causal_pass(name):
    check(MODELS[name], "causal", None)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["paced", "predictor", "threshold"])
def test_staged_mode_by_every_routing_with_bounds_that_are_hit_and_not(routing):
    tight = dataclasses.replace(MODELS["staged"][1], capacity=0.1)
    for slack, layers in ((None, MODELS["staged"]), (1.0, [Dense(), tight])):
        masks = check(layers, routing, slack)
        missed = sum(np.sum(m["requested_BL"] & ~m["selected_BL"]) for m in masks.values())
        hit = slack is not None and routing == "threshold"  # the others stay below their bounds
        assert (missed > 0) == hit


BY_CHANCE = block(MoE(4, TokenChoice(2, no_ops=4, random_no_ops=True)))
BY_NOISE = {"capacity": 0.5, "rule": Random(), "causal": Predictor()}
DRAWN = MoD(Seq(Attention(), MLP()), **BY_NOISE)
SELECTED = {
    "MoD": [MoD(BY_CHANCE, **TAUGHT)],
    "Sequence-AltUp": [Dense(), SequenceAltUp(BY_CHANCE, stride=2)],
    "MoD in MoD": [MoD(DRAWN, **TAUGHT)],
    "strides": [StrideSkip(BY_CHANCE, stride=2), StridePool(DRAWN, stride=2)],
    "MoD and a stride": [MoD(SequenceAltUp(BY_CHANCE, stride=2), **TAUGHT)],
    "a stride and MoD": [SequenceAltUp(MoD(Seq(DRAWN, BY_CHANCE), **TAUGHT), stride=2)],
    "by chance": [MoD(Seq(BY_CHANCE, DRAWN), **BY_NOISE)],
    "strides of strides": [StridePool(SequenceAltUp(DRAWN, stride=2), stride=2)],
}
LONG = [name for name in SELECTED if name not in ("MoD", "Sequence-AltUp")]


# LENGTHS and TOTALS are ragged: which rows are routed differs from step to step.
@pytest.mark.parametrize(
    "name, routing",
    [
        ("MoD", "predictor"),
        pytest.param("Sequence-AltUp", "causal", marks=pytest.mark.slow),
        *(pytest.param(name, "predictor", marks=pytest.mark.slow) for name in LONG),
        *(pytest.param(name, "threshold", marks=pytest.mark.slow) for name in LONG),
    ],
)
def test_random_layers_within_a_selection_draw_by_sequence_and_position(name, routing):
    check(SELECTED[name], routing, None)


@pytest.mark.slow
def test_random_layers_on_streams_within_a_selection_draw_by_sequence_and_position():
    layers = [MoD(AltUp(BY_CHANCE), **TAUGHT), SequenceAltUp(AltUp(DRAWN, active=1), stride=2)]
    check(layers, "threshold", 1.5, streams=Recycled(2))


def test_the_best_causal_routing_and_what_has_none():
    def best(*layers):
        return model_config(*layers).causal_routing()

    assert best(Dense()) == "trained" == best(Dense(), SequenceAltUp())
    assert best(block(MoE(4))) == "causal" == best(*MODELS["staged"]) == best(MoD(block(MoE(4))))
    looks_ahead = block(MoE(4, ExpertChoice()))
    assert best(looks_ahead) is None and best(*MODELS["staged"], looks_ahead) is None


def test_experts_that_choose_are_refused_without_looking_ahead_in_one_line():
    config = model_config(block(MoE(4, ExpertChoice())))
    for routing in ("causal", "predictor", "paced", "threshold"):
        with pytest.raises(InputError) as caught:
            config.check_routing(routing, "--routing")
        assert str(caught.value).startswith(f"--routing = '{routing}': Seq(Attention(), MoE(")
        assert "has no rule that never looks ahead" in str(caught.value) and "\n" not in str(
            caught.value
        )
    config.check_routing("trained", "--routing")
    dataclasses.replace(config, layers=(block(MoE(4)),)).check_routing("causal", "--routing")
