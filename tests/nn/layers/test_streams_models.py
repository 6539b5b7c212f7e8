"""Models on residual streams: their start, their scan, and their errors.

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
from modjax.nn import Call, Transformer, build
from modjax.specs import (
    AltUp,
    Dense,
    Full,
    Gemma3nAltUp,
    ManifoldHyperConnection,
    MoD,
    Projected,
    Recycled,
    Seq,
    Tied,
)
from modjax.training.state import abstract_model
from tests.nn.layers.streams import (
    START,
    TOKENS,
    TWO,
    alternating,
    connected,
    here,
    logits,
    model,
    params_of,
    rms_norm,
)
from tests.nn.small import QUICK


def with_inner(config, plain):
    """Returns parameters of a model at its start, with the inner layers of a plain model."""
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
    """AdamW's first step, g / |g|, must agree for a batch in two orders."""
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
    ropes = built._ropes(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape[1])
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
