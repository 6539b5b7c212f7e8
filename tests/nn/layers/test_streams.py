"""Layers on residual streams against plain loops in float64, and finite differences.

Legend: B batch, L positions, S streams, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import Call
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Dense,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    MoD,
    MoE,
    Projected,
    Rope,
    Seq,
    SimplifiedAltUp,
    TokenChoice,
)
from tests.nn.layers.streams import INNER, SHAPE, B, D, L, S, here, inner, random_layer, rms_norm
from tests.nn.small import QUICK, check_gradients


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
    """Returns the streams in the terms of arXiv 2409.19606: the rows of H are the streams."""
    h, a_m, a_r, b = np.stack(x), p["a_m"], p["a_r"], p["b"]
    if "w" in p:
        found = np.tanh(rms_norm(h, p["norm"]["scale"]) @ p["w"])
        a_m = a_m + p["scales"][0] * found[:, 0]
        b = b + p["scales"][1] * found[:, 1]
        a_r = a_r + p["scales"][0] * found[:, 2:]
    read = a_m @ h
    return list(a_r.T @ h + np.outer(b, inner(p["inner"], read) - read))


def manifold(p, x, active):
    """Returns the streams in the terms of arXiv 2512.24880: comb^T H + post (inner)."""
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
    at = here(L)._replace(
        ropes={"Rope()": rotary_tables(jnp.arange(L)[None], Rope(), 2, L, jnp.float32)}
    )

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
