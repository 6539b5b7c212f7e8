"""FLOPs and parameters against published tables, XLA's own count, and the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.flops import cache_bytes, forward_flops, parameters, total_flops, train_flops
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
    ((MoD(rule=Binary(), causal=Predictor()), MoD(rule=Threshold(), causal=Predictor())), 8),
    ((RECEIVED, MoD(router=Received(), rule=TopK(weight="one"), causal=Predictor())), 8),
    ((Seq(Attention(), MoE(4, shared=1, width=1024)),), 8),
    ((Seq(Attention(), MoE(8, TokenChoice(2, no_ops=4), activation="swiglu")),), 8),
    ((MoD(Seq(Attention(), MoE(4, ExpertChoice())), capacity=0.5),), 8),
    ((SequenceAltUp(stride=4), StrideSkip(MoD(), stride=2)), 8),
]

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
