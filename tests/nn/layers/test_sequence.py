"""Layers on every k-th position, against plain loops, and with a cache.

Legend: B batch, L positions, J anchors, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.flops import cache_bytes
from modjax.nn import Call, Transformer, build
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Causal,
    Dense,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    MoD,
    ModelSpec,
    MoE,
    Predictor,
    Projected,
    Recycled,
    Repeat,
    Rope,
    Seq,
    SequenceAltUp,
    SimplifiedAltUp,
    StridePool,
    StrideSkip,
    TokenChoice,
    TopK,
    Window,
)
from tests.nn.layers.streams import INNER, SHAPE, alternating, here, inner, random_layer
from tests.nn.small import QUICK, check_gradients, random_model
from tests.nn.test_cached_decoding import LENGTHS, TOTALS, both_ways

B, L, D = 2, 10, 4
ONE = SHAPE._replace(streams=1)


def sequence_altup(p, x, stride, first=0):
    a1, a2, b = p["scalars"]
    found = list(x[:first])
    for i in range(first, len(x)):
        anchor = x[first + stride * ((i - first) // stride)]
        predicted, of_anchor = a1 * x[i] + a2 * anchor, (a1 + a2) * anchor
        found.append(predicted + b * (inner(p["inner"], anchor) - of_anchor))
    return found


def skip(p, x, stride, first=0):
    return [inner(p["inner"], v) if i % stride == first else v for i, v in enumerate(x)]


def pool(p, x, stride, first=0):
    found = list(x[:first])
    for i in range(first, len(x)):
        anchor = first + stride * ((i - first) // stride)
        seen = np.mean(x[max(0, anchor - stride + 1) : anchor + 1], axis=0)
        found.append(x[i] + inner(p["inner"], seen) - seen)
    return found


FORMS = {
    "altup": (SequenceAltUp, sequence_altup),
    "skip": (StrideSkip, skip),
    "pool": (StridePool, pool),
}


@pytest.mark.parametrize("stride", [3, 4])
@pytest.mark.parametrize("kind, formula", FORMS.values(), ids=FORMS)
def test_values_and_gradients_equal_a_loop_over_positions(kind, formula, stride):
    graphdef, params = random_layer(kind(INNER, stride=stride), shape=ONE)
    rng = np.random.default_rng(1)
    x_BLD, weight_BLD = rng.normal(size=(2, B, L, D))

    def theirs(params, x_BLD):
        rows = np.array([formula(params, x_LD, stride) for x_LD in x_BLD])
        return np.sum(weight_BLD * rows), rows

    def ours(params, x_BLD):
        out = nnx.merge(graphdef, params)(x_BLD, here(L), Call())
        return jnp.sum(jnp.float32(weight_BLD) * out.x), out.x

    single = jax.tree.map(jnp.float32, (params, x_BLD))
    run = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True), compiler_options=QUICK)
    (_, found), gradients = run(*single)
    np.testing.assert_allclose(found, theirs(params, x_BLD)[1], rtol=2e-5, atol=2e-5)
    check_gradients(lambda *moved: theirs(*moved)[0], (params, x_BLD), gradients, rng)


@pytest.mark.parametrize("kind, formula", FORMS.values(), ids=FORMS)
def test_within_a_selection_strides_restart_with_each_document(kind, formula):
    stride = 3
    graphdef, params = random_layer(kind(INNER, stride=stride), shape=ONE)
    # Documents of 4, 7 and 2 positions, and padding; a row where none of the first is selected; and
    # one of many short ones.
    short = [1, 1, 2, 3, 3, 4, 5, 5, 5, 6, 7, 7, 8, 0]
    segments_BL = np.array([[1] * 4 + [2] * 7 + [3] * 2 + [0], [2] * 6 + [4] * 8, short])
    x_BLD = np.random.default_rng(4).normal(size=(*segments_BL.shape, D))
    expected_BLD = x_BLD.copy()
    for x_LD, segments_L, expected_LD in zip(x_BLD, segments_BL, expected_BLD, strict=True):
        for document in set(segments_L) - {0}:
            mine_L, first = segments_L == document, 0 if document == 1 else stride - 1
            expected_LD[mine_L] = formula(params, x_LD[mine_L], stride, first)
    at = here(14)._replace(
        segments_BL=jnp.asarray(segments_BL), valid_BL=jnp.asarray(segments_BL > 0)
    )

    def run(params, x_BLD):
        seen = []
        layer = nnx.merge(graphdef, params)
        inside = layer.inner
        layer.inner = lambda x, *rest: seen.append(x.shape) or inside(x, *rest)
        out = layer(x_BLD, at, Call(selected=True))
        assert seen == [(3, 5, D)]  # ceil(14 / 3) anchors, however many documents
        return out.x

    single = jax.tree.map(jnp.float32, (params, x_BLD))
    found_BLD = jax.jit(run, compiler_options=QUICK)(*single)
    np.testing.assert_allclose(found_BLD, expected_BLD, rtol=2e-5, atol=2e-5)
    assert np.any(np.abs(expected_BLD - x_BLD) > 1e-3, axis=(1, 2)).all()


def test_at_stride_1_with_scalars_that_sum_to_1_it_is_the_layer():
    graphdef, params = random_layer(SequenceAltUp(INNER, stride=1), shape=ONE)
    params["scalars"] = np.array([0.3, 0.7, 1.0])
    params = jax.tree.map(jnp.float32, params)
    x_BLD = jnp.float32(np.random.default_rng(2).normal(size=(B, L, D)))
    layer = nnx.merge(graphdef, params)
    expected = layer.inner(x_BLD, here(L), Call()).x
    np.testing.assert_allclose(layer(x_BLD, here(L), Call()).x, expected, atol=1e-5)


def test_anchors_attend_to_anchors_at_their_own_rotary_angles():
    layer = build(StrideSkip(Attention(), stride=3), ONE, rngs=nnx.Rngs(0))
    x_BLD = jnp.float32(np.random.default_rng(3).normal(size=(B, L, D)))
    positions_BL = jnp.arange(L)[None]
    at = here(L)._replace(ropes={"Rope()": rotary_tables(positions_BL, Rope(), 2, L, jnp.float32)})
    cos_sin = tuple(table[:, ::3] for table in at.ropes["Rope()"])
    alone = at._replace(positions_BL=positions_BL[:, ::3], ropes={"Rope()": cos_sin})
    expected = layer.inner(x_BLD[:, ::3], alone, Call()).x
    found = layer(x_BLD, at, Call()).x
    np.testing.assert_allclose(found[:, ::3], expected, atol=1e-6)
    others = np.arange(L) % 3 != 0
    np.testing.assert_array_equal(found[:, others], x_BLD[:, others])


def model(*layers, depth=3, **changes):
    values = {"d_model": 8, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16} | changes
    return ModelSpec(20, num_layers=depth, layers=layers, **values)


def between(layer, **changes):
    """Returns a model whose first and last layers see every position."""
    ends = Repeat(Dense(), times=1)
    return model(ends, Repeat(layer), ends, depth=4, **changes)


TAUGHT = {"capacity": 0.5, "rule": TopK(auxiliary=1.0), "causal": Predictor()}
MODELS = {
    "altup": between(SequenceAltUp(Dense(), stride=3)),
    "skip": between(StrideSkip(Dense(), stride=3)),
    "pool": between(StridePool(Dense(), stride=3)),
    "a window": between(SequenceAltUp(Seq(Attention(mask=Causal() & Window(4)), MLP()), stride=2)),
    "around MoD": between(SequenceAltUp(MoD(**TAUGHT), stride=2)),
    "pooled around MoD": between(StridePool(MoD(**TAUGHT), stride=2)),
    "around MoE": between(SequenceAltUp(Seq(Attention(), MoE(4, TokenChoice(2))), stride=2)),
    "within MoD": between(MoD(SequenceAltUp(Dense(), stride=2), **TAUGHT)),
    "pooled within MoD": between(MoD(StridePool(Dense(), stride=2), **TAUGHT)),
    "altup of altup": model(
        SequenceAltUp(AltUp(), stride=2), AltUp(active=1), depth=4, streams=Recycled(2)
    ),
    "within altup": model(
        *alternating(AltUp, SequenceAltUp(Dense(), stride=2)), depth=4, streams=Recycled(2)
    ),
    "streams": model(
        AltUp(),
        SimplifiedAltUp(active=1),
        Gemma3nAltUp(active=2),
        Seq(HyperConnection(Attention(), dynamic=True), ManifoldHyperConnection(MLP())),
        depth=4,
        streams=Projected(3),
    ),
    "streams in MoD": model(
        *(MoD(layer, **TAUGHT) for layer in alternating(AltUp, Dense())),
        depth=4,
        streams=Recycled(2),
    ),
}


LONG = ("pooled within MoD", "within altup", "altup of altup", "within MoD", "streams in MoD")
LONG += ("pooled around MoD",)
SLOW = [(name, "causal") for name in LONG]
SLOW += [(name, "threshold") for name, config in MODELS.items() if config.routed()]
BY = [(name, "causal") for name in MODELS if name not in LONG]
BY += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize("name, routing", BY)
def test_cached_decoding_and_turns_equal_the_full_causal_pass(name, routing):
    config = MODELS[name]
    results = both_ways(config, routing, None, LENGTHS, TOTALS)
    (logits_BLV, _), (first_BV, _, _), decoded, _, (later_BV, *_) = results
    logits_SBV, _, active_SB, *_ = decoded
    assert 0.1 < np.std(logits_BLV) < 10
    for b, (length, total) in enumerate(zip(LENGTHS, TOTALS, strict=True)):
        np.testing.assert_allclose(first_BV[b], logits_BLV[b, length - 1], atol=2e-5)
        np.testing.assert_allclose(later_BV[b], logits_BLV[b, total - 1], atol=2e-5)
        found_SV = logits_SBV[active_SB[:, b], b]
        np.testing.assert_allclose(found_SV, logits_BLV[b, length:total], atol=2e-5)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_no_position_sees_a_later_one(config):
    graphdef, params = random_model(config, std=0.5, seed=3)
    tokens_BL = np.random.default_rng(5).integers(0, 20, (1, 12))
    changed_BL = tokens_BL.copy()
    changed_BL[:, 7:] = 19 - changed_BL[:, 7:]
    routing = "threshold" if config.routed() else "trained"
    run = jax.jit(
        lambda params, tokens_BL: nnx.merge(graphdef, params)(tokens_BL, routing=routing)[0],
        compiler_options=QUICK,
    )
    one, other = run(params, tokens_BL), run(params, changed_BL)
    np.testing.assert_array_equal(one[:, :7], other[:, :7])
    assert np.all(np.max(np.abs(one[:, 7:] - other[:, 7:]), axis=2) > 1e-3)


@pytest.mark.parametrize("kind", [SequenceAltUp, StrideSkip, StridePool])
def test_a_document_never_looks_at_an_anchor_of_another(kind):
    config = between(kind(Dense(), stride=4))
    graphdef, params = random_model(config, std=0.5, seed=6)
    tokens_BL = np.random.default_rng(7).integers(0, 20, (1, 13))
    segments_BL = np.repeat([1, 2, 0], [6, 5, 2])[None]

    def run(params, tokens_BL):
        return nnx.merge(graphdef, params)(tokens_BL, segments_BL)[0]

    compiled = jax.jit(run, compiler_options=QUICK)
    changed_BL = tokens_BL.copy()
    changed_BL[:, :6] = 19 - changed_BL[:, :6]
    one, other = compiled(params, tokens_BL), compiled(params, changed_BL)
    np.testing.assert_array_equal(one[:, 6:11], other[:, 6:11])
    assert np.all(one[:, :6] != other[:, :6])


def test_a_cache_holds_a_quarter_of_the_positions_and_two_vectors():
    dense, quarter = model(Dense()), model(SequenceAltUp(Dense(), stride=4))
    counted = cache_bytes(quarter, 64)
    assert counted == cache_bytes(dense, 16) + 3 * 4 * 2 * 8
    reader = Transformer(quarter, rngs=nnx.Rngs(0)).reader(max_length=64, routing="causal")
    _, cache, _ = jax.eval_shape(reader, jnp.zeros((1, 5), int), jnp.array([5]), None)
    held = sum(leaf.size for leaf in jax.tree.leaves(cache.layers) if leaf.dtype == np.float32)
    assert 4 * held == counted


def test_what_does_not_fit_is_refused_in_one_line():
    for kind in (SequenceAltUp, StrideSkip, StridePool):
        with pytest.raises(InputError) as caught:
            kind(Dense(), stride=0)
        assert str(caught.value) == f"{kind.__name__}.stride = 0: must be greater than 0"
    MODELS["around MoD"].check_routing("paced", "--routing")
    with pytest.raises(InputError, match=r"'paced': must be one of trained, causal$"):
        MODELS["altup"].check_routing("paced", "--routing")
