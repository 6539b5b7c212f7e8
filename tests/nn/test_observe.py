"""Measured numbers in the training loop of a foreign model.

Legend: B batch, L positions, K selected positions, D width.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.errors import InputError
from modjax.nn import MoDBlock, build, under
from modjax.specs import Binary, MoDConfig, MoE, Positional, Shape, Threshold, TokenChoice
from tests.nn.layers.with_experts import CONFIG, B, L, WithExperts, X
from tests.nn.small import WIDTH, Mixer


class Two(nnx.Module):
    """Foreign model with a routed block in a list, and one in a module of its own."""

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
    """Returns the mean over steps and rows of the 3rd best of 12 scores (capacity 0.25)."""
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
