"""A routed block in somebody's own model: what its inner block returns, and what its loop measures.

Legend: B batch, L positions, K selected positions, D width.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.errors import InputError
from modjax.nn import (
    At,
    Call,
    Inside,
    MoDBlock,
    TokenLoss,
    build,
    losses,
    statistics,
    totals,
    under,
)
from modjax.specs import (
    Binary,
    MoDConfig,
    MoE,
    Positional,
    Predictor,
    Shape,
    Threshold,
    TokenChoice,
)
from tests.nn.small import QUICK, WIDTH, Mixer
from tests.nn.test_records import Reward

B, L, K = 2, 12, 6
X = np.random.default_rng(0).normal(size=(B, L, WIDTH)).astype(np.float32)
CONFIG = MoDConfig(capacity=K / L, causal=Predictor())


class Beside(NamedTuple):
    x: jax.Array
    first_BK: jax.Array
    note: dict[str, jax.Array]


class Returns(nnx.Module):
    """Doubles x, and returns beside it the first number of every position."""

    def __init__(self, form: str):
        self.form = form

    def __call__(self, x_BKD):
        first_BK, y_BKD = x_BKD[..., 0], 2 * x_BKD
        return {
            "x alone": y_BKD,
            "tuple": (y_BKD, first_BK, {"scalar": jnp.float32(3)}),
            "named": Beside(y_BKD, first_BK, {"scalar": jnp.float32(3)}),
            "dictionary": {"aux": first_BK, "hidden": y_BKD},
            "record": (y_BKD, {"reward": Reward(first_BK)}),
            "one number": jnp.mean(y_BKD, axis=-1, keepdims=True),
            "too wide": (jnp.concatenate([y_BKD, y_BKD], axis=-1), first_BK),
            "a list of names": ("x", first_BK),
            "a word": (y_BKD, {"note": "first"}),
        }[self.form]


def returned(form, *, output="x", routing="trained", **options):
    block = MoDBlock(Returns(form), WIDTH, CONFIG, rngs=nnx.Rngs(0), output=output)
    return block(jnp.asarray(X), routing=routing, **options)


FIRST = {
    "tuple": lambda extra: extra[0],
    "named": lambda extra: extra.first_BK,
    "dictionary": lambda extra: extra["aux"],
}


@pytest.mark.parametrize("routing", ["trained", "predictor"])
@pytest.mark.parametrize("form", FIRST)
def test_what_the_inner_block_returns_beside_x_comes_back_with_its_positions(form, routing):
    output = "hidden" if form == "dictionary" else "x"
    valid_BL = np.arange(L)[None] < np.array([[12], [4]])
    y, routed = returned(form, output=output, routing=routing, valid_BL=valid_BL)
    alone, plain = returned("x alone", routing=routing, valid_BL=valid_BL)
    np.testing.assert_array_equal(y, alone)
    assert plain.extra is None and plain.indices_BK is None
    np.testing.assert_allclose(routed.loss(), plain.loss())
    first_BK = np.asarray(FIRST[form](routed.extra))
    assert first_BK.shape == (B, K if routing == "trained" else L)
    for b in range(B):
        selected = np.flatnonzero(routed.selected_BL[b])
        assert 0 < len(selected) < L
        np.testing.assert_array_equal(routed.indices_BK[b][routed.valid_BK[b]], selected)
        np.testing.assert_array_equal(first_BK[b][routed.valid_BK[b]], X[b, selected, 0])
    if form == "named":
        assert isinstance(routed.extra, Beside) and routed.extra.x is None
        assert routed.extra.note["scalar"] == 3
    if form == "dictionary":
        assert set(routed.extra) == {"aux"}


def test_a_record_from_inside_looks_at_the_loss_of_the_selected_positions():
    _, routed = returned("record")
    nll = np.random.default_rng(1).random((B, L)).astype(np.float32)
    seen = np.stack([nll[b, np.flatnonzero(routed.selected_BL[b])] for b in range(B)])
    first = np.stack([X[b, np.flatnonzero(routed.selected_BL[b]), 0] for b in range(B)])
    own = float(returned("x alone")[1].loss())
    expected = own - (first * seen).mean()
    np.testing.assert_allclose(routed.loss(TokenLoss(nll)), expected, rtol=1e-5)
    stacked = {"routed": jax.tree.map(lambda leaf: leaf[None], routed)}
    np.testing.assert_allclose(losses(stacked, TokenLoss(nll)), expected, rtol=1e-5)
    said = statistics(stacked)
    np.testing.assert_allclose(said["routed/0/reward/chance"], first.mean(), rtol=1e-5)
    assert 0 < said["router/capacity"] < 1


class WithExperts(nnx.Module):
    """Somebody's block with our experts in it."""

    def __init__(self, rngs):
        shape = Shape(WIDTH, 2, 2, 2, 4, 16, 1e-6)
        self.moe = build(MoE(4, TokenChoice(2, balance=0.3, z=0.2)), shape, rngs=rngs)

    def __call__(self, x_BKD, positions_BK, valid_BK):
        out = self.moe(x_BKD, At(positions_BK, None, valid_BK, {}, {}), Call())
        return out.x, out.records


def test_our_experts_in_somebodys_block_keep_their_losses():
    block = MoDBlock(WithExperts(nnx.Rngs(1)), WIDTH, CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block)
    valid_BL = np.arange(L)[None] < np.array([[12], [4]])

    def loss(params):
        positions_BL = jnp.arange(L)[None]
        _, routed = nnx.merge(graphdef, params)(
            X, positions_BL, jnp.asarray(valid_BL), valid_BL=jnp.asarray(valid_BL)
        )
        return routed.loss(), routed

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    grads, routed = run(params)
    taken = X[np.asarray(routed.selected_BL)].astype(np.float64)
    logits = (
        taken / np.sqrt((taken**2).mean(-1, keepdims=True) + 1e-6) @ block.inner.moe.router.w[...]
    )
    odds = np.exp(logits)
    odds /= odds.sum(-1, keepdims=True)
    picks = np.argsort(-odds, axis=-1)[:, :2]
    share = np.bincount(picks.ravel(), minlength=4) / picks.size
    balance = 4 * (share * odds.mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    router = np.mean(routed.own["causal"].losses["predictor"])
    np.testing.assert_allclose(routed.loss(), router + 0.3 * balance + 0.2 * z, rtol=1e-5)
    assert np.abs(grads.inner.moe.router.w[...]).max() > 1e-3
    assert all(isinstance(inner, Inside) for inner in routed.extra[0].values())
    said = statistics({"routed": jax.tree.map(lambda leaf: leaf[None], routed)})
    np.testing.assert_allclose(said["routed/0/rule/moe/balance"], balance, rtol=1e-5)


def test_totals_of_two_halves_make_their_losses_those_of_the_whole():
    block = MoDBlock(WithExperts(nnx.Rngs(1)), WIDTH, CONFIG, rngs=nnx.Rngs(0))
    routed = block(X, jnp.arange(L)[None], jnp.ones((1, L), bool))[1]
    whole = {"routed": jax.tree.map(lambda leaf: leaf[None], routed)}
    halves = [jax.tree.map(lambda leaf, b=b: leaf[:, b : b + 1], whole) for b in range(B)]
    tokens = TokenLoss(jnp.zeros((B, L)))
    few = TokenLoss(tokens.nll_BL[:1])
    sums = jax.tree.map(lambda *parts: sum(parts) / B, *map(totals, halves))
    assert jax.tree.leaves(sums)
    shared = [losses(half, few, sums) for half in halves]
    np.testing.assert_allclose(np.mean(shared), losses(whole, tokens), rtol=1e-5)
    alone = [losses(half, few) for half in halves]
    assert abs(np.mean(alone) - np.mean(shared)) > 1e-3


@pytest.mark.parametrize("routing", ["trained", "predictor"])
def test_anything_but_arrays_and_numbers_beside_x_is_refused_in_one_line(routing):
    with pytest.raises(InputError) as caught:
        returned("a word", routing=routing)
    said = "inner = 'first': must return arrays and numbers beside x, nothing else"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "form, said",
    [
        ("one number", "inner = (2, 6, 1): must return x with the shape (2, 6, 8) that it got"),
        ("too wide", "inner = (2, 6, 16): must return x with the shape (2, 6, 8) that it got"),
        ("a list of names", "must return x with the shape (2, 6, 8) that it got"),
        ("dictionary", "inner = ['aux', 'hidden']: must have the key 'x', for x: see MoDBlock's"),
    ],
)
def test_another_output_is_refused_in_one_line(form, said):
    with pytest.raises(InputError) as caught:
        returned(form)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Measured numbers in somebody's own training loop.


class Two(nnx.Module):
    """Somebody's model: a routed block in a list, and one in a module of its own."""

    def __init__(self, rngs):
        config = MoDConfig(capacity=0.25, rule=Threshold())
        make = functools.partial(MoDBlock, d_model=WIDTH, config=config, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs), make(Mixer(rngs))])
        self.head = nnx.Dict({"routed": make(Mixer(rngs))})

    def __call__(self, x_BLD, routing="trained"):
        x_BLD = self.layers[0](x_BLD)
        x_BLD, first = self.layers[1](x_BLD, routing=routing)
        x_BLD, second = self.head["routed"](x_BLD, routing=routing)
        return x_BLD, {"layers/1": first, "head/routed": second}


INPUTS = np.random.default_rng(3).normal(size=(4, B, L, WIDTH)).astype(np.float32)


def means_of_third_scores(scores_SBL):
    """The plain mean over steps and rows of the 3rd best score, of 12 at capacity 0.25."""
    return np.sort(scores_SBL, axis=-1)[..., -3].mean()


def test_a_foreign_loop_measures_every_threshold_and_counts_them():
    model = Two(nnx.Rngs(0))

    @nnx.jit
    def step(model, x_BLD, number):
        _, records = model(x_BLD)
        measured, count = modjax.observe(nnx.state(model), records, number)
        nnx.update(model, measured)
        return {name: record.scores_BL for name, record in records.items()}, count

    scores = []
    for number, x_BLD in enumerate(INPUTS):
        found, count = step(model, x_BLD, number)
        assert count == 2
        scores.append(found)
    for name, block in (("layers/1", model.layers[1]), ("head/routed", model.head["routed"])):
        expected = means_of_third_scores(np.stack([found[name] for found in scores]))
        np.testing.assert_allclose(block.rule.threshold[...], [expected], rtol=1e-5)
    # After 100 updates the mean begins to forget.
    before = np.asarray(model.layers[1].rule.threshold[...])
    found, _ = step(model, INPUTS[0], 1000)
    latest = means_of_third_scores(np.asarray(found["layers/1"])[None])
    moved = before + 0.01 * (latest - before)
    np.testing.assert_allclose(model.layers[1].rule.threshold[...], moved, rtol=1e-5)


def test_one_functional_state_is_measured_like_the_model_itself():
    model = Two(nnx.Rngs(0))
    _, records = model(INPUTS[0])
    graphdef, rest, measured = nnx.split(model, nnx.Param, ...)
    for state in (measured, nnx.to_pure_dict(measured), nnx.state(model)):
        new, count = modjax.observe(state, records, 0)
        assert count == 2 and jax.tree.structure(new) == jax.tree.structure(state)
        flat = {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(new)}
        changed = {name: v for name, v in flat.items() if "threshold" in name}
        scores = [np.asarray(record.scores_BL)[None] for record in records.values()]
        expected = sorted(map(means_of_third_scores, scores))
        np.testing.assert_allclose(
            np.sort(np.concatenate([*changed.values()])), expected, rtol=1e-5
        )
    merged = nnx.merge(graphdef, rest, modjax.observe(measured, records, 0)[0])
    assert merged.layers[1].rule.threshold[...] != 0


def test_layers_under_a_scan_are_measured_with_their_repetitions():
    config = MoDConfig(capacity=0.25, rule=Threshold())

    @nnx.vmap
    def make(key):
        rngs = nnx.Rngs(key)
        return MoDBlock(Mixer(rngs), WIDTH, config, rngs=rngs)

    blocks = make(jax.random.split(jax.random.key(0), 3))
    run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    _, records = run(X, blocks)
    new, count = modjax.observe({"b": nnx.state(blocks)}, {"b": records}, 0, stacked=True)
    assert count == 3
    expected = [[means_of_third_scores(s[None])] for s in np.asarray(records.scores_BL)]
    np.testing.assert_allclose(new["b"]["rule"]["threshold"][...], expected, rtol=1e-5)
    for rows in (1, B):
        few = jax.tree.map(lambda leaf, rows=rows: leaf[:, :rows], records)
        with pytest.raises(InputError, match="set stacked=True for layers under"):
            modjax.observe(nnx.state(blocks), {"": few}, 0)
    one = MoDBlock(Mixer(nnx.Rngs(0)), WIDTH, config, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="numbers that begin with the same dim"):
        modjax.observe(nnx.state(one), {"": one(X)[1]}, 0, stacked=True)


def test_experts_inside_are_measured_by_the_path_that_they_are_given():
    shape = Shape(WIDTH, 2, 2, 2, 4, 16, 1e-6)
    inner = WithExperts(nnx.Rngs(1))
    inner.moe = build(MoE(4, TokenChoice(2, bias_rate=0.1)), shape, rngs=nnx.Rngs(1))
    block = MoDBlock(inner, WIDTH, CONFIG, rngs=nnx.Rngs(0))
    _, routed = block(X, jnp.arange(L)[None], jnp.ones((1, L), bool))
    records = {"": routed, **under("inner/moe", routed.extra[0])}
    new, count = modjax.observe(nnx.state(block), records, 0)
    assert count == 1 + 4
    load = np.bincount(np.asarray(routed.extra[0][""].record.experts_BLP).ravel(), minlength=4)
    bias = new["inner"]["moe"]["rule"]["bias"][...]
    np.testing.assert_allclose(bias, 0.1 * np.sign(load.mean() - load), rtol=1e-6)
    rule = routed.extra[0]["rule"]
    for wrong in ({"inner/moe": rule}, {"inner/moe/experts": rule}):
        with pytest.raises(InputError, match="has no measured 'bias'"):
            modjax.observe(nnx.state(block), wrong, 0)


@pytest.mark.parametrize("path", ["layers", "layers/2", "layers/0", "head", "routed", ""])
def test_a_wrong_path_is_an_error(path):
    model = Two(nnx.Rngs(0))
    _, records = model(INPUTS[0])
    with pytest.raises(InputError) as caught:
        modjax.observe(nnx.state(model), {path: records["layers/1"]}, 0)
    said = str(caught.value)
    rule = f"{path}/rule".lstrip("/")
    assert said.startswith(f"records = {rule!r}: has no measured 'threshold': must be the path of")
    assert "'layers/1/rule'" in said and "'head/routed/rule'" in said and "\n" not in said


def test_a_threshold_that_was_never_measured_is_said_where_it_selects():
    model = Two(nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def call(routing):
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, routing=routing))
        return lambda state: jax.block_until_ready(run(state, INPUTS[0]))

    measured, _ = modjax.observe(state, call("trained")(state)[1], 0)
    for run in (call("threshold"), lambda state: nnx.merge(graphdef, state)(X, "threshold")):
        with pytest.warns(UserWarning, match="never measured: call modjax.observe"):
            run(state)
            jax.effects_barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(measured)
            jax.effects_barrier()
    program = jax.jit(lambda state: nnx.merge(graphdef, state)(INPUTS[0])).lower(state)
    assert "callback" not in program.as_text()  # jax caches no program that calls the host


@pytest.mark.parametrize("rule", [Positional(), Binary()])
def test_a_router_with_a_rule_of_its_own_needs_no_threshold(rule):
    block = MoDBlock(Mixer(nnx.Rngs(0)), WIDTH, MoDConfig(rule=rule), rngs=nnx.Rngs(0))
    assert block(X, routing="threshold")[1].selected_BL.shape == (B, L)  # warnings are errors
