"""FLOPs and parameters of small models against counts by hand."""

import dataclasses

from modjax.flops import forward_flops, parameters, run_flops, six_nd, stream_bytes, train_flops
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Binary,
    Dense,
    Full,
    MoD,
    ModelSpec,
    MoE,
    Predictor,
    Received,
    Seq,
    SequenceAltUp,
    Threshold,
    TokenChoice,
    TrainConfig,
)

RECEIVED = Seq(Attention(received=True), MLP())


def test_components_of_a_small_model_equal_a_count_by_hand():
    model = ModelSpec(10, 4, 2, 2, 1, 6, (Dense(), MoD(capacity=0.5)))
    got = forward_flops(model, 8)  # 8 tokens in the dense layer, 4 in the routed one
    assert got == {
        "embedding": 2 * 8 * 10 * 4,
        "qkv": 2 * (8 + 4) * 4 * (4 + 2 + 2),
        "scores": 2 * (8 * 8 + 4 * 4) * 4,
        "softmax": 3 * (8 * 8 + 4 * 4) * 2,
        "values": 2 * (8 * 8 + 4 * 4) * 4,
        "output": 2 * (8 + 4) * 4 * 4,
        "mlp": 2 * (8 + 4) * 2 * 4 * 6,
        "router": 2 * 8 * 4,
        "predictor": 0,
        "logits": 2 * 8 * 10 * 4,
    }
    assert train_flops(model, 8, 5) == 15 * (sum(got.values()) - got["embedding"] - got["softmax"])


def test_streams_equal_a_count_by_hand():
    layers = (AltUp(active=0), SequenceAltUp(AltUp(active=1), stride=2))
    model = ModelSpec(10, 8, 2, 2, 2, 5, layers, streams=Full(3))
    got, plain = forward_flops(model, 6), forward_flops(ModelSpec(10, 8, 2, 2, 2, 5), 6)
    assert got["logits"] == 2 * 6 * 10 * 24
    assert got["mlp"] == plain["mlp"] * 3 / 4  # the second layer runs on half of the positions
    assert got["streams"] == (6 + 3) * (2 * 9 * 8 + 2 * 3 * 8)  # mixed, and the update added
    assert got["anchors"] == 6 * 24 * (5 + 4 / 2)
    counts = parameters(model)
    assert (counts["streams"], counts["anchors"]) == (2 * (9 + 3), 3)
    assert counts["embedding"] == counts["logits"] == 10 * 24
    # Between two layers three streams of 8 numbers for each of 100 tokens.
    assert stream_bytes(model, 100) == 2 * 3 * 8 * 100 * 4
    assert stream_bytes(dataclasses.replace(model, dtype="bfloat16"), 100) == 2 * 3 * 8 * 100 * 2


def test_experts_equal_a_count_by_hand():
    moe = MoE(4, TokenChoice(2, no_ops=4), width=6, shared=1, capacity_factor=1.5)
    model = ModelSpec(10, 8, 1, 2, 2, 5, Seq(Attention(), moe))
    got = forward_flops(model, 10)
    # 20 picks, half of them of 4 experts: 2.5 each, and 4 slots (3.75 rounded up).
    assert got["experts"] == 2 * (4 * 4) * 2 * 8 * 6
    assert got["mlp"] == 2 * 10 * 2 * 8 * 6  # the shared expert
    assert got["router"] == 2 * 10 * 8 * (4 + 4)
    counts = parameters(model)
    assert counts["experts"] == 4 * 2 * 8 * 6 and counts["mlp"] == 2 * 8 * 6
    attention = 4 * 8 * 8 + 3 * 8  # and three norms
    # Two picks, of which one is of an expert.
    assert counts["active"] == attention + 8 * 8 + (1 + 1) * 2 * 8 * 6
    dropless = dataclasses.replace(moe, capacity_factor=None)
    model = ModelSpec(10, 8, 1, 2, 2, 5, Seq(Attention(), dropless))
    assert forward_flops(model, 10)["experts"] == 2 * 10 * 2 * 8 * 6


def test_a_smaller_capacity_is_the_control_of_no_ops_at_the_same_executed_flops():
    no_ops, reduced = MoE(8, TokenChoice(no_ops=8)), MoE(8, capacity_factor=1.25 / 2)
    assert no_ops.computed(512) == reduced.computed(512) == 8 * 40
    assert MoE(8, TokenChoice(no_ops=8, random_no_ops=True)).computed(512) == 8 * 40
    assert MoE(8, capacity_factor=100.0).slots(20) == 20 and MoE(8).slots(1) == 1
    assert MoE(10, capacity_factor=1.1).slots(100) == 11  # not 12 by a last bit


def test_routers_and_predictors_of_every_kind_equal_a_count_by_hand():
    mod = MoD(capacity=0.25, causal=Predictor())
    changes = ({"router": Received()}, {"rule": Binary()}, {"rule": Threshold(slack=1.5)})
    layers = (RECEIVED, *(dataclasses.replace(mod, **change) for change in changes))
    model = ModelSpec(10, 8, 8, 2, 2, 6, layers)
    got = forward_flops(model, 8)  # 8, 2 and 2 tokens, and 3 with slots for 1.5 times 2
    assert got["mlp"] == 2 * 2 * (8 + 2 + 2 + 3) * 2 * 8 * 6
    assert got["scores"] == 2 * 2 * (64 + 4 + 4 + 9) * 8
    assert got["router"] == 2 * 2 * 8 * 8 * (0 + 2 + 1)
    assert got["predictor"] == 2 * 3 * 2 * 8 * (8 * 2 + 2)  # 8 -> 2 -> 1
    # Its input takes no gradient: one backward product, not two.
    others = sum(got.values()) - got["embedding"] - got["softmax"] - got["predictor"]
    assert train_flops(model, 8, 5) == 5 * (3 * others + 2 * got["predictor"])
    counts = parameters(model)
    assert counts["router"] == 2 * 8 * (0 + 2 + 1)
    assert counts["predictor"] == 2 * 3 * (8 * 2 + 2 + 2)
    plain = parameters(ModelSpec(10, 8, 8, 2, 2, 6, (Dense(),)))
    assert counts["total"] == plain["total"] + counts["router"] + counts["predictor"]


def test_a_run_costs_what_its_steps_cost():
    model = ModelSpec(10, 4, 2, 2, 1, 6, (Dense(), MoD(capacity=0.0625)))
    train = TrainConfig(5, 32, 12, 1e-3, 0)
    k = 2
    # Forward and backward of 5 sequences: 32 tokens in the dense block, k in the routed.
    linear = 2 * (32 + k) * (4 * (4 + 2 + 2) + 4 * 4 + 2 * 4 * 6)
    step = 15 * (linear + 2 * 2 * (32 * 32 + k * k) * 4 + 2 * 32 * 4 + 2 * 32 * 4 * 10)
    assert [run_flops(model, train, done) for done in (0, 1, 12)] == [0, step, 12 * step]


def test_every_other_block_at_an_eighth_needs_nine_sixteenths_of_the_linear_flops():
    dense = ModelSpec(32_000, 1024, 8, 8, 8, 4096)
    mod = ModelSpec(32_000, 1024, 8, 8, 8, 4096, (Dense(), MoD()))
    for name in ("qkv", "output", "mlp"):
        assert forward_flops(mod, 2048)[name] / forward_flops(dense, 2048)[name] == 0.5625


def test_each_place_of_the_pattern_can_have_a_capacity_of_its_own():
    layers = (Dense(), MoD(capacity=0.5), Dense(), MoD(capacity=0.25))
    mixed = ModelSpec(50, 16, 4, 2, 2, 64, layers)
    full, half, quarter = (
        forward_flops(ModelSpec(50, 16, 1, 2, 2, 64, (layer,)), 64)["mlp"]
        for layer in (layers[0], layers[1], layers[3])
    )
    assert (half, quarter) == (full / 2, full / 4)
    assert forward_flops(mixed, 64)["mlp"] == 2 * full + half + quarter
    block = 4 * 16 * 16 + 2 * 16 * 64 + 2 * 16
    assert parameters(mixed)["active"] == 2.75 * block + 16 + 2 * 16


def test_parameters_active_per_token_count_routed_blocks_by_capacity():
    dense = parameters(ModelSpec(50, 16, 4, 2, 2, 64))
    mod = parameters(ModelSpec(50, 16, 4, 2, 2, 64, (Dense(), MoD())))
    block = 4 * 16 * 16 + 2 * 16 * 64 + 2 * 16
    assert dense["active"] == dense["non_embedding"] == 4 * block + 16
    assert mod["non_embedding"] == dense["non_embedding"] + 2 * 16
    assert mod["active"] == 2 * block + 2 * block / 8 + 16 + 2 * 16
    assert dense["total"] == dense["non_embedding"] + 2 * 50 * 16
    assert six_nd(ModelSpec(50, 16, 4, 2, 2, 64), 100) == 600 * dense["non_embedding"]
