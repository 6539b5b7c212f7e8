"""FLOPs and parameters against published tables, hand formulas and XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.flops import (
    cache_bytes,
    forward_flops,
    parameters,
    run_flops,
    six_nd,
    stream_bytes,
    total_flops,
    train_flops,
)
from modjax.nn import Transformer
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Binary,
    Causal,
    Dense,
    ExpertChoice,
    Full,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    MoD,
    ModelSpec,
    MoE,
    Predictor,
    Projected,
    Received,
    Recycled,
    Seq,
    SequenceAltUp,
    SimplifiedAltUp,
    StrideSkip,
    Threshold,
    Tied,
    TokenChoice,
    TopK,
    TrainConfig,
    Window,
    selected_tokens,
)

QUICK = {"xla_backend_optimization_level": "0"}
# Chinchilla (arXiv 2203.15556) Table A9 shapes: d_model, d_ff, heads, layers, and the ratio of
# their FLOPs to 6 N D in Table A4.
CHINCHILLA = [
    (640, 2560, 10, 10, 1.03),
    (1024, 4096, 16, 20, 1.10),
    (1280, 5120, 10, 24, 1.08),
    (1792, 7168, 14, 26, 1.04),
    (2048, 8192, 16, 28, 1.03),
    (3584, 14336, 28, 40, 0.99),
]


@pytest.mark.parametrize("d, f, heads, layers, published", CHINCHILLA)
def test_chinchilla_table_a4_is_reproduced_without_embedding_and_logits(
    d, f, heads, layers, published
):
    model = ModelSpec(32_000, d, layers, heads, heads, f, head=Tied())
    # Chinchilla's N also holds its relative-position matrices, d * d a layer (Transformer-XL).
    n = parameters(model)["total"] + layers * d * d
    ratio = train_flops(model, 2048, 1, "chinchilla_table_a4") / (6 * n * 2048)
    assert ratio == pytest.approx(published, abs=0.006)
    as_printed = train_flops(model, 2048, 1, "chinchilla") / (6 * n * 2048)
    assert as_printed > published + 0.03


RECEIVED = Seq(Attention(received=True), MLP())


def patterns(dense):
    return [(dense,), (dense, MoD(dense)), (MoD(dense),)]


CASES = [
    *((pattern, 8) for pattern in patterns(Dense())),
    *((pattern, 2) for pattern in patterns(Dense("swiglu"))),
    ((MoD(rule=Binary(), causal=Predictor()),
      MoD(rule=Threshold(), causal=Predictor())), 8),
    ((RECEIVED, MoD(router=Received(), rule=TopK(weight="one"), causal=Predictor())), 8),
    ((Seq(Attention(), MoE(4, shared=1, width=1024)),), 8),
    ((Seq(Attention(), MoE(8, TokenChoice(2, no_ops=4), activation="swiglu")),), 8),
    ((MoD(Seq(Attention(), MoE(4, ExpertChoice())), capacity=0.5),), 8),
    ((SequenceAltUp(stride=4), StrideSkip(MoD(), stride=2)), 8),
]  # fmt: skip
ON_STREAMS = [
    ((AltUp(active=0), AltUp(MoD(), active=1)), Recycled(2)),
    ((AltUp(active=1), SimplifiedAltUp(active=3)), Full(4)),
    ((Seq(HyperConnection(Attention(), dynamic=True), HyperConnection(MLP())),), Recycled(4)),
    ((Gemma3nAltUp(), MoD(AltUp())), Projected(4)),
    ((ManifoldHyperConnection(),), Recycled(4)),
]


@pytest.mark.parametrize(
    "layers, kv_heads, streams",
    [(*case, None) for case in CASES] + [(layers, 8, ends) for layers, ends in ON_STREAMS],
)
def test_matrix_products_agree_with_what_xla_counts(layers, kv_heads, streams):
    # Elementwise work is a share of about 1/d of XLA's count: a wide model isolates the products.
    # 128 positions are one query chunk, in which attention skips no future keys.
    config = ModelSpec(1024, 768, 2, 8, kv_heads, 3072, layers, streams=streams)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)

    def forward(params, tokens):
        logits, records = nnx.merge(graphdef, params)(tokens, layer_loop="unroll")
        return logits, [getattr(record, "logits_BL", None) for record in records.values()]

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    step = jax.jit(forward).lower(params, tokens)
    # Compiled, elementwise work that is fused into several readers counts once for each of them.
    step = step if streams else step.compile(QUICK)
    counted = step.cost_analysis()["flops"]
    assert 2 * total_flops(forward_flops(config, 128)) == pytest.approx(counted, rel=0.02)


def windowed(size, layer=lambda attention: Seq(attention, MLP()), **shape):
    mask = Causal() & Window(size) if size else Causal()
    values = {"d_model": 4, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 6} | shape
    return ModelSpec(10, layers=layer(Attention(mask=mask)), **values)


def test_a_window_counts_its_own_pairs_and_keys_only():
    full, window = (forward_flops(windowed(size), 8) for size in (None, 3))
    pairs = {"scores": 2 * 4, "softmax": 3 * 2, "values": 2 * 4}
    assert {name: full[name] for name in full if full[name] != window[name]} == {
        name: 2 * each * 8 * 8 for name, each in pairs.items()
    }
    assert {name: window[name] for name in pairs} == {
        name: 2 * each * 8 * 3 for name, each in pairs.items()
    }
    wide = forward_flops(windowed(100), 8)
    assert wide == full
    # Two layers of two numbers of 2, for a key and a value, and of 4 bytes each.
    assert [cache_bytes(windowed(size), 50) for size in (None, 3, 100)] == [
        2 * 2 * 2 * 4 * kept for kept in (50, 3, 50)
    ]

    # Of 100 positions, MoD's cache holds 20 at most, and a window shows few of them.
    def routed(attention):
        return MoD(Seq(attention, MLP()), capacity=0.2)

    assert [cache_bytes(windowed(size, routed), 100, 1.0) for size in (None, 3)] == [
        2 * 2 * 2 * 4 * kept for kept in (20, 3)
    ]
    assert forward_flops(windowed(3, routed), 100)["values"] == 2 * 2 * 4 * 20 * 3


def test_a_window_computes_its_keys_and_those_of_a_chunk_more():
    found = {}
    for size in (None, 256):
        config = windowed(size, d_model=64, num_layers=1, num_heads=1, d_ff=64)
        model = nnx.eval_shape(lambda config=config: Transformer(config, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        run = jax.jit(lambda params, x, graphdef=graphdef: nnx.merge(graphdef, params)(x)[0])
        x = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        found[size] = run.lower(params, x).compile(QUICK).cost_analysis()["flops"]
    # Chunks of 512 queries see 512 to 2048 keys; of 128, up to 128 + 255. A pair costs two products
    # of 64 wide, and some elementwise work.
    chunks = [min(128 * (i + 1), 128 + 255) for i in range(16)]
    saved = 512 * (512 + 1024 + 1536 + 2048) - 128 * sum(chunks)
    assert (found[None] - found[256]) / (saved * 4 * 64) == pytest.approx(1.0, abs=0.06)


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
    # 20 picks, half of them of 4 experts: 2.5 each, and room for 4 (3.75 rounded up).
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
    got = forward_flops(model, 8)  # 8, 2 and 2 tokens, and 3 where there is room for 1.5 times 2
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


def test_capacity_selects_the_same_number_of_tokens_as_the_model():
    capacities = (0.3, 0.32, 0.01, 1.0)
    layers = tuple(MoD(capacity=capacity) for capacity in capacities)
    config = ModelSpec(10, 8, len(layers), 2, 1, 8, layers)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)

    def selected(params, tokens):
        records = nnx.merge(graphdef, params)(tokens)[1]
        return [records[f"{i}_mod"].selected_BL.sum(axis=-1) for i in range(len(layers))]

    counts = jax.jit(selected, compiler_options=QUICK)(params, rng.integers(0, 10, (2, 24)))
    in_the_model = [count.tolist() for count in counts]
    assert in_the_model == [[[selected_tokens(c, 24)] * 2] for c in capacities]
    assert [selected_tokens(c, 24) for c in capacities] == [7, 8, 1, 24]
