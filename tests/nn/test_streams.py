"""Layers on residual streams against plain loops in float64, and what follows from their formulas.

Legend: B batch, L positions, S streams, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.nn import At, Call, Transformer, build
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Dense,
    Full,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    MoD,
    ModelSpec,
    MoE,
    Projected,
    Recycled,
    Seq,
    Shape,
    SimplifiedAltUp,
    Tied,
    TokenChoice,
)
from modjax.training.state import abstract_model
from tests.nn.small import QUICK, check_gradients

B, L, S, D, F = 2, 3, 3, 4, 6
SHAPE = Shape(D, 2, 2, 2, 2, F, 1e-6, S)
INNER = MLP("relu2")


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def inner(p, x):
    hidden = np.maximum(rms_norm(x, p["norm"]["scale"]) @ p["w_in"], 0) ** 2
    return x + hidden @ p["w_out"].T


def altup(p, x, active):
    predicted = [sum(p["p"][i, j] * x[j] for j in range(S)) for i in range(S)]
    computed = inner(p["inner"], x[active])
    return [predicted[i] + p["g"][i] * (computed - predicted[active]) for i in range(S)]


def summed(p, x, active):
    update = inner(p["inner"], x[active]) - x[active]
    return [stream + update for stream in x]


def simplified(p, x, active):
    read = sum(p["r"][i] * x[i] for i in range(S))
    update = S * (inner(p["inner"], read) - read)
    return [stream + update * (i == active) for i, stream in enumerate(x)]


def hyper_connection(p, x, active):
    """arXiv 2409.19606 in its own terms: the rows of H are the streams."""
    h, a_m, a_r, b = np.stack(x), p["a_m"], p["a_r"], p["b"]
    if "w" in p:
        found = np.tanh(rms_norm(h, p["norm"]["scale"]) @ p["w"])
        a_m = a_m + p["scales"][0] * found[:, 0]
        b = b + p["scales"][1] * found[:, 1]
        a_r = a_r + p["scales"][0] * found[:, 2:]
    read = a_m @ h
    return list(a_r.T @ h + np.outer(b, inner(p["inner"], read) - read))


def manifold(p, x, active):
    """arXiv 2512.24880 in its own terms, its mix as `comb`: new = comb^T H + post (inner)."""
    h = np.stack(x)
    v = rms_norm(h.reshape(-1), 1.0) @ p["w"]
    a_pre, a_post, a_res = p["scales"]
    pre = 1 / (1 + np.exp(-(a_pre * v[:S] + p["b_read"])))
    post = 2 / (1 + np.exp(-(a_post * v[S : 2 * S] + p["b_write"])))
    comb = np.exp(a_res * v[2 * S :].reshape(S, S) + p["b_mix"])
    comb = comb / comb.sum(1, keepdims=True) + 1e-6
    for _ in range(20):
        comb = comb / comb.sum(1, keepdims=True)
        comb = comb / comb.sum(0)
    read = pre @ h
    return list(comb.T @ h + np.outer(post, inner(p["inner"], read) - read))


def gemma(p, x, active):
    def modes(v):
        return np.tanh(rms_norm(v, p["norm"]["scale"]) / D @ p["w"])

    found = modes(x[active])
    a = sum(found[m] * p["p"][m] for m in range(S))
    predicted = [x[i] + sum(a[i, j] * x[j] for j in range(S)) for i in range(S)]
    computed = inner(p["inner"], predicted[active])
    c = 1 + modes(computed) @ p["c"]
    return [predicted[i] + c[i] * (computed - predicted[active]) for i in range(S)]


FORMS = {
    "AltUp": (AltUp(INNER, active=1), altup),
    "its sum": (AltUp(INNER, active=1, learned=False), summed),
    "simplified": (SimplifiedAltUp(INNER, active=2), simplified),
    "hyper-connection": (HyperConnection(INNER, active=1), hyper_connection),
    "dynamic": (HyperConnection(INNER, active=1, dynamic=True), hyper_connection),
    "mHC": (ManifoldHyperConnection(INNER, active=1), manifold),
    "Gemma 3n": (Gemma3nAltUp(INNER, active=2), gemma),
}


def here(length):
    return At(jnp.arange(length)[None], None, None, {}, {})


def random_layer(spec, seed=0, shape=SHAPE):
    """The graph definition and random parameters of a layer."""
    graphdef, state = nnx.split(build(spec, shape, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape), params)


@pytest.mark.parametrize("spec, formula", FORMS.values(), ids=FORMS)
def test_values_and_gradients_equal_a_loop_over_positions_and_streams(spec, formula):
    graphdef, params = random_layer(spec)
    rng = np.random.default_rng(1)
    x_BLSD, weight_BLSD = rng.normal(size=(2, B, L, S, D))

    def theirs(params, x_BLSD):
        rows = [[formula(params, list(x_SD), spec.active) for x_SD in x_LSD] for x_LSD in x_BLSD]
        return np.sum(weight_BLSD * np.array(rows)), np.array(rows)

    def ours(params, x_BLSD):
        out = nnx.merge(graphdef, params)(x_BLSD, here(L), Call())
        return jnp.sum(jnp.float32(weight_BLSD) * out.x), out.x

    single = jax.tree.map(jnp.float32, (params, x_BLSD))
    run = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True), compiler_options=QUICK)
    (_, found), gradients = run(*single)
    np.testing.assert_allclose(found, theirs(params, x_BLSD)[1], rtol=2e-5, atol=2e-5)
    check_gradients(lambda *moved: theirs(*moved)[0], (params, x_BLSD), gradients, rng)


# The change that an inner layer makes depends on the direction of what it reads alone (a norm comes
# first), or on its size too. Gemma 3n's write weights read what the inner layer returns.
READS = {
    "simplified": (SimplifiedAltUp(MLP()), "r", True),
    "static": (HyperConnection(MoE(2, TokenChoice(renormalise=False), norm="both")), "a_m", True),
    "mHC": (ManifoldHyperConnection(Attention()), "b_read", True),
    "two sublayers": (SimplifiedAltUp(Dense()), "r", False),
    "one in a Seq, and another": (HyperConnection(Seq(MLP(), MLP())), "a_m", False),
    "a norm after": (SimplifiedAltUp(MLP(norm="after")), "r", False),
    "MoD": (HyperConnection(MoD(MLP(), capacity=0.5)), "a_m", False),
    "MoD in mHC": (ManifoldHyperConnection(MoD(MLP(), capacity=0.5)), "b_read", False),
    "Gemma 3n": (Gemma3nAltUp(MLP()), "p", False),
}


@pytest.mark.parametrize("spec, name, by_direction", READS.values(), ids=READS)
def test_read_weights_of_equal_streams_have_the_gradient_of_finite_differences(
    spec, name, by_direction
):
    graphdef, params = random_layer(spec)
    if name == "p":
        params["c"] *= 20  # as large as what the mix has to say
    params = jax.tree.map(jnp.float32, params)
    rng = np.random.default_rng(3)
    x_BLSD = jnp.float32(np.repeat(rng.normal(size=(B, L, 1, D)), S, axis=2))
    weight_BLSD = jnp.float32(rng.normal(size=x_BLSD.shape))
    at = here(L)._replace(ropes={1e4: rotary_tables(jnp.arange(L)[None], 2, 1e4, jnp.float32)})

    def loss(read):
        out = nnx.merge(graphdef, params | {name: read})(x_BLSD, at, Call())
        return jnp.sum(weight_BLSD * out.x)

    run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    gradient = np.asarray(run(params[name])[1])
    slopes = np.zeros(gradient.shape)
    for index in np.ndindex(gradient.shape):
        moved = [run(params[name].at[index].add(step))[0] for step in (4e-3, -4e-3)]
        slopes[index] = (moved[0] - moved[1]) / 8e-3
    np.testing.assert_allclose(gradient, slopes, rtol=0.02, atol=5e-3)
    if by_direction:
        np.testing.assert_array_equal(gradient, 0)
    else:
        assert np.max(np.abs(slopes)) > 0.05


TOKENS = np.random.default_rng(0).integers(0, 20, (2, 9))


TWO = Recycled(2)


def model(*layers, streams=TWO, **changes):
    return ModelSpec(20, 8, 4, 2, 2, 16, layers=layers, streams=streams, **changes)


def alternating(kind, inner, streams=2, **options):
    return tuple(kind(inner, active=i, **options) for i in range(streams))


def logits(config, params=None, **options):
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state) if params is None else params

    def run(params):
        return nnx.merge(graphdef, params)(TOKENS, **options)[0]

    return jax.jit(run, compiler_options=QUICK)(params)


def params_of(config):
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0))))


def with_inner(config, plain):
    """Parameters of a model at its start, whose inner layers are those of a plain model."""
    params = params_of(config)
    pairs = zip(*(p["stack"]["blocks"].values() for p in (params, plain)), strict=True)
    for ours, theirs in pairs:
        if "inner" in ours:
            ours["inner"] = theirs
            continue
        both = zip(*(block["parts"].values() for block in (ours, theirs)), strict=True)
        for connection, part in both:  # one is around each sublayer
            connection["inner"] = part
    for name in ("embed", "final_norm", "unembed"):
        params[name] = plain[name]
    return params


def connected(active, kind=HyperConnection, **options):
    pair = Attention(), MLP()
    return Seq(*(kind(p, (active + i) % 2, **options) for i, p in enumerate(pair)))


START = {
    "alternating": model(*alternating(AltUp, Dense())),
    "same": model(AltUp(Dense()), AltUp(Dense())),
    "four streams": model(*alternating(AltUp, Dense(), 4), streams=Recycled(4)),
    "sum": model(*alternating(AltUp, Dense(), learned=False)),
    "simplified": model(*alternating(SimplifiedAltUp, Dense())),
    "static": model(connected(0), connected(1)),
    "dynamic": model(connected(0, dynamic=True), connected(1, dynamic=True)),
    "mHC": model(*(connected(i, ManifoldHyperConnection) for i in range(2))),
    "Gemma 3n": model(Gemma3nAltUp(Dense()), Gemma3nAltUp(Dense())),
    "around MoD": model(*alternating(AltUp, MoD(capacity=0.5))),
    "around MoE": model(*alternating(AltUp, Seq(Attention(), MoE(2)))),
}


@pytest.mark.parametrize("config", START.values(), ids=START)
def test_at_the_start_on_copies_it_is_the_model_of_the_inner_layers(config):
    def bare(layer):
        if isinstance(layer, Seq):
            return Seq(*(part.inner for part in layer.parts))
        return layer.inner

    plain = dataclasses.replace(config, streams=None, layers=tuple(map(bare, config.layers)))
    params = params_of(plain)
    expected = logits(plain, params)
    found = logits(config, with_inner(config, params))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_at_the_start_every_coefficient_has_a_gradient_and_no_two_streams_have_the_same():
    config = START["alternating"]
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))

    def loss(params):
        found = nnx.merge(graphdef, params)(TOKENS)[0]
        return -jnp.mean(jax.nn.log_softmax(found[:, :-1])[..., 3])

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(nnx.to_pure_dict(state))
    for block in grads["stack"]["blocks"].values():
        for leaf in (block["p"], block["g"]):
            assert np.all(np.abs(leaf) > 1e-7)
        # The last layer's are the same: its streams have one mean.
        first = block["g"][0]
        assert abs(first[0] - first[1]) > 1e-6


EQUAL = {
    **START,
    "static, read by all": model(connected(0), streams=Recycled(4)),
    "dynamic, read by all": model(connected(1, dynamic=True), streams=Recycled(3)),
    "mHC, read by all": model(connected(0, ManifoldHyperConnection), streams=Recycled(4)),
    "within MoD": model(MoD(connected(0), capacity=0.5)),
}
SHORT = ("static, read by all", "dynamic, read by all", "mHC", "simplified", "Gemma 3n")


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in EQUAL],
)
def test_at_the_start_no_coefficient_of_streams_moves_by_rounding_noise(name):
    """AdamW's first step is g / |g|: of a batch and of the same in another order it must agree."""
    graphdef, state = nnx.split(Transformer(EQUAL[name], rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    tokens_BL = rng.integers(0, 20, (16, 12))

    def loss(params, tokens_BL):
        found = nnx.merge(graphdef, params)(tokens_BL[:, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens_BL[:, 1:]).mean()

    run = jax.jit(jax.grad(loss), compiler_options=QUICK)
    one, other = (
        jax.tree_util.tree_leaves_with_path(run(nnx.to_pure_dict(state), rows_BL))
        for rows_BL in (tokens_BL, tokens_BL[rng.permutation(16)])
    )
    checked = 0
    for (path, ours), (_, again) in zip(one, other, strict=True):
        owners = [key.key for key in path[:-1] if key.key != "norm"]
        if not (owners and owners[-1].endswith(("altup", "connection"))):
            continue
        if path[-1].key in ("a_m", "b_read", "b_mix"):  # they only tell streams apart
            np.testing.assert_array_equal(ours, 0)
        steps = [g / (np.abs(g) + 1e-8) for g in (np.asarray(ours), np.asarray(again))]
        assert np.max(np.abs(steps[0] - steps[1])) < 0.05, path
        checked += 1
    assert checked or name == "sum"


def test_a_full_altup_at_the_start_reads_one_residual_against_each_part_of_its_table():
    config = model(*alternating(AltUp, Dense()), streams=Full(2))
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    tables = np.split(params["embed"]["table"], 2, axis=1)  # (V, D) each
    rows, updates = [table[TOKENS] for table in tables], 0.0
    built = nnx.merge(graphdef, params)
    layers = [build(Dense(), config.shape._replace(streams=1), rngs=nnx.Rngs(0)) for _ in range(4)]
    ropes = built._ropes(jnp.arange(TOKENS.shape[1])[None])
    at = here(TOKENS.shape[1])._replace(ropes=ropes)
    for number, layer in enumerate(layers):
        active = number % 2
        block = params["stack"]["blocks"][f"{active}_altup"]["inner"]
        nnx.update(layer, jax.tree.map(lambda leaf, g=number // 2: leaf[g], block))
        x = rows[active] + updates
        updates = updates + layer(x, at, Call()).x - x
    wide = np.concatenate([np.asarray(row + updates) for row in rows], axis=-1)
    normed = rms_norm(wide, np.asarray(params["final_norm"]["scale"]))
    np.testing.assert_allclose(built(TOKENS)[0], normed @ params["unembed"]["w_logits"], atol=2e-5)


def test_projected_streams_are_as_large_as_the_first_there_and_back():
    shape = SHAPE._replace(streams=1)
    graphdef, params = random_layer(Projected(3), shape=shape)
    ends = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
    x = np.random.default_rng(2).normal(size=(B, L, D)).astype(np.float32)

    def size(v):
        return np.sqrt(np.mean(np.square(v), axis=-1, keepdims=True))

    opened = np.asarray(ends.open(x))
    np.testing.assert_array_equal(opened[:, :, 0], x)
    for s in (1, 2):
        direct = x @ params["w_open"][s - 1]
        np.testing.assert_allclose(opened[:, :, s], direct * size(x) / size(direct), rtol=1e-4)
    back = [opened[:, :, s] @ params["w_close"][s - 1] for s in (1, 2)]
    mean = (x + sum(b * size(x) / size(b) for b in back)) / 3
    np.testing.assert_allclose(ends.close(opened), mean, rtol=1e-4, atol=1e-5)


def test_what_mod_skips_stays_as_it_is_only_where_the_prediction_is_the_identity():
    shape = SHAPE._replace(streams=2)
    x = np.random.default_rng(3).normal(size=(B, 8, 2, D)).astype(np.float32)

    def unselected(spec, path, change):
        graphdef, params = random_layer(spec, shape=shape)
        params = jax.tree.map(jnp.float32, params)
        owner = params if path is None else params[path]
        owner["p"] = jnp.eye(2) + change * jnp.array([[0.0, 1.0], [1.0, 0.0]])
        out = nnx.merge(graphdef, params)(jnp.asarray(x), here(8), Call())
        record = next(r for name, r in out.records.items() if name in ("", "inner"))
        chosen = np.asarray(record.selected_BL)
        assert np.any(np.asarray(out.x)[chosen] != x[chosen])
        return np.asarray(out.x)[~chosen], x[~chosen]

    around, within = AltUp(MoD(INNER, capacity=0.5)), MoD(AltUp(INNER), capacity=0.5)
    np.testing.assert_allclose(*unselected(around, None, 0.0), atol=1e-6)
    found, given = unselected(around, None, 0.1)
    assert np.min(np.max(np.abs(found - given), axis=(1, 2))) > 1e-3
    for change in (0.0, 0.1):  # around the whole, all streams pass by
        np.testing.assert_array_equal(*unselected(within, "inner", change))


FORMS_OF_MODELS = {
    **START,
    "full": model(*alternating(AltUp, Dense()), streams=Full(2)),
    "full and tied": model(*alternating(AltUp, Dense()), streams=Full(2), head=Tied()),
    "projected": model(Gemma3nAltUp(Dense()), Gemma3nAltUp(Dense()), streams=Projected(3)),
    "within MoD": model(*(MoD(layer, capacity=0.5) for layer in alternating(AltUp, Dense()))),
}


@pytest.mark.parametrize("config", FORMS_OF_MODELS.values(), ids=FORMS_OF_MODELS)
def test_scanned_layers_equal_unrolled_ones_and_bfloat16_is_close(config):
    config = dataclasses.replace(config, layers=config.layers, num_layers=4)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).normal(size=leaf.shape),
        params_of(config),
    )
    params = jax.tree.map(jnp.float32, params)
    unrolled = logits(config, params, layer_loop="unroll")
    np.testing.assert_allclose(logits(config, params, layer_loop="scan"), unrolled, atol=2e-5)
    if "mod" in str(config.layers).lower():
        return  # a selection may flip on a last bit
    half = logits(dataclasses.replace(config, dtype="bfloat16"), params)
    error = np.sqrt(np.mean(np.square(half - unrolled)) / np.mean(np.square(unrolled)))
    assert 0 < error < 0.03


def test_weight_decay_never_touches_a_coefficient():
    small = {"p", "g", "r", "a_m", "a_r", "b", "c", "scales", "b_read", "b_write", "b_mix"}
    seen = set()
    for config in START.values():
        decays = abstract_model(config).decays
        for path, decay in jax.tree_util.tree_leaves_with_path(decays):
            name = path[-1].key
            if name in small:
                seen.add(name)
                assert not decay
            assert decay or name not in ("w_in", "w_q")
    assert seen == small


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": (Dense(),)}, "'Attention()': works on one residual stream"),
        ({"layers": (MoD(),)}, "'Attention()': works on one residual stream"),
        ({"layers": (AltUp(Dense()),), "streams": None}, "needs model.streams"),
        ({"layers": (AltUp(AltUp(Dense())),)}, "needs model.streams"),
        ({"layers": (AltUp(Dense(), active=2),)}, "AltUp.active = 2: must be 0 to 1"),
        ({"streams": "Recycled(1)"}, "Recycled.streams = 1: must be 2 to 64"),
        ({"streams": "Dense()"}, "model.streams = 'Dense()': must be such as Recycled(2)"),
        ({"streams": "Recycled(2), Full(2)"}, "must be such as Recycled(2)"),
        ({"streams": "Logits()"}, "model.streams = 'Logits()': must be such as Recycled(2)"),
        ({"streams": 2}, "model.streams = 2: must be such as Recycled(2), or None"),
        ({"layers": (Recycled(2),)}, "(Recycled(streams=2),): must be layers, or all"),
        ({"layers": ("MoD(Recycled(2))",)}, "(streams=2): must be of type Layer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, said):
    given = {"layers": alternating(AltUp, Dense()), "streams": TWO} | changes
    with pytest.raises(InputError) as caught:
        model(*given["layers"], streams=given["streams"])
    assert said in str(caught.value) and "\n" not in str(caught.value)
