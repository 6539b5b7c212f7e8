"""Mixture of experts against a loop over positions in numpy, and what must hold of any.

Legend: B batch, S positions, D width, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import build
from modjax.nn.records import statistics
from modjax.specs import MLP, Binary, ExpertChoice, MoD, MoE, Seq, TokenChoice
from tests.nn.layers.moe_by_loop import (
    CASES,
    SHAPE,
    VALID_BL,
    B,
    D,
    S,
    arrays,
    by_loop,
    call,
    inputs,
    layer_of,
    normed,
    rows_of,
    with_arrays,
)


@pytest.mark.parametrize("valid_BL", [None, VALID_BL], ids=["full", "padded"])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_equals_a_loop_over_positions(spec, valid_BL):
    layer, x_BLD = layer_of(spec), inputs()
    out = call(layer, x_BLD, valid_BL)
    expected_BLD, dropped = by_loop(spec, *arrays(layer), x_BLD, valid_BL)
    valid = np.ones((B, S), bool) if valid_BL is None else np.array(valid_BL)
    np.testing.assert_allclose(out.x[valid], expected_BLD[valid], atol=2e-5)
    record = out.records[""]
    assert int(jnp.sum(record.picked_BL - record.taken_BL)) == dropped
    assert ("drops" in next(n for n, s in CASES.items() if s == spec)) <= (dropped > 0)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_loop(spec):
    layer, x_BLD = layer_of(spec), inputs()
    params, measured = arrays(layer)
    rng = np.random.default_rng(5)
    target_BLD = rng.standard_normal(x_BLD.shape)

    def loss(params, x_BLD):
        return jnp.sum(call(with_arrays(layer, params), x_BLD).x * jnp.float32(target_BLD))

    floats = jax.tree.map(jnp.float32, params)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(floats, x_BLD)
    leaves, structure = jax.tree.flatten((params, np.array(x_BLD, float)))
    for i, grad in enumerate(jax.tree.leaves(grads)):
        way = rng.standard_normal(leaves[i].shape) / np.sqrt(leaves[i].size)

        def moved(by, i=i, way=way):
            at = [leaf + by * way if j == i else leaf for j, leaf in enumerate(leaves)]
            params, x = jax.tree.unflatten(structure, at)
            return np.sum(by_loop(spec, params, measured, x)[0] * target_BLD)

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        np.testing.assert_allclose(np.sum(grad * way), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "spec", [c for c in CASES.values() if not isinstance(c.rule, ExpertChoice)]
)
def test_without_looking_ahead_no_pick_is_dropped_and_few_positions_are_as_many(spec):
    layer, x_BLD = layer_of(spec), inputs()
    many = call(layer, x_BLD, routing="causal")
    expected_BLD, dropped = by_loop(spec, *arrays(layer), x_BLD, routing="causal")
    np.testing.assert_allclose(many.x, expected_BLD, atol=2e-5)
    assert dropped == 0 and jnp.array_equal(many.records[""].picked_BL, many.records[""].taken_BL)
    few = call(layer, x_BLD[:, :4], routing="causal")  # expert by expert
    np.testing.assert_allclose(few.x, many.x[:, :4], atol=1e-5)
    layer.split_weights()
    assert jnp.array_equal(call(layer, x_BLD, routing="causal").x, many.x)
    assert jnp.array_equal(call(layer, x_BLD[:, :4], routing="causal").x, few.x)


def test_one_expert_is_the_mlp_and_equal_experts_are_it_too():
    x_BLD = inputs()
    dense = build(MLP(), SHAPE, rngs=nnx.Rngs(0))
    for spec in (MoE(1), MoE(4, TokenChoice(2, renormalise=True), capacity_factor=2.0)):
        layer = layer_of(spec)
        for name in ("w_in", "w_out"):
            layer.experts[name][...] = jnp.stack([getattr(dense, name)[...]] * spec.experts)
        np.testing.assert_allclose(call(layer, x_BLD).x, call(dense, x_BLD).x, atol=1e-6)


def test_the_order_of_experts_does_not_matter():
    layer, x_BLD, order = layer_of(CASES["top 2 of 1.0 with drops"]), inputs(), [2, 0, 3, 1]
    before = call(layer, x_BLD).x
    layer.router.w[...] = layer.router.w[...][:, jnp.array(order)]
    for w in layer.experts.values():
        w[...] = w[...][jnp.array(order)]
    np.testing.assert_allclose(call(layer, x_BLD).x, before, atol=1e-6)


def test_enough_capacity_never_drops_and_is_dropless():
    spec = MoE(4, TokenChoice(2), capacity_factor=2.0)
    slots, x_BLD = layer_of(spec), inputs()
    groups = layer_of(dataclasses.replace(spec, capacity_factor=None))
    out = call(slots, x_BLD)
    np.testing.assert_allclose(out.x, call(groups, x_BLD).x, atol=1e-6)
    assert jnp.array_equal(out.records[""].picked_BL, out.records[""].taken_BL)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_every_pick_is_accounted_for(spec):
    records = call(layer_of(spec), inputs(), VALID_BL).records
    record = records[""]
    stacked = jax.tree.map(lambda z: z[None], {f"a/{name}": one for name, one in records.items()})
    found = {name: float(v) for name, v in statistics(stacked).items()}
    asked, taken, picks, computed = (
        np.array(z) for z in (record.picked_BL, record.taken_BL, record.picks_B, record.computed_B)
    )
    assert (taken <= asked).all() and not asked[~np.array(VALID_BL)].any()
    if isinstance(spec.rule, TokenChoice):
        assert picks.sum() == spec.rule.top_k * np.array(VALID_BL).sum()
    if spec.capacity_factor is not None:
        assert (computed == spec.experts * spec.slots(S)).all()
    np.testing.assert_allclose(
        found["moe/dropped"], 1 - taken.sum() / max(asked.sum(), 1), atol=1e-6
    )
    np.testing.assert_allclose(found["moe/useful"], taken.sum() / computed.sum(), atol=1e-6)
    np.testing.assert_allclose(
        found["moe/idle"], np.mean(taken[np.array(VALID_BL)] == 0), atol=1e-6
    )


def test_all_no_ops_leave_the_stream_as_it_is_bit_for_bit_with_finite_gradients():
    for spec in (
        MoE(4, TokenChoice(no_ops=4)),
        MoE(4, TokenChoice(2, no_ops=4, renormalise=True), norm="both"),
        MoE(4, TokenChoice(2, no_ops=4, renormalise=True), capacity_factor=None),
    ):
        layer, x_BLD = layer_of(spec), jnp.abs(inputs())
        layer.router.w[...] = jnp.tile(
            jnp.where(jnp.arange(rows_of(spec)) < 4, -9.0, 9.0)[None], (D, 1)
        )

        def loss(w_DR, x_BLD, layer=layer):
            return jnp.sum(jnp.sin(call(with_arrays(layer, {"w": w_DR}), x_BLD).x))

        assert (np.array(call(layer, x_BLD).x) == np.array(x_BLD)).all()
        grads = jax.grad(loss, argnums=(0, 1))(layer.router.w[...], x_BLD)
        assert all(np.isfinite(g).all() for g in grads) and not np.any(grads[0])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("no_ops", [2, 14])
def test_renormalised_weights_beside_no_ops_still_teach_the_router(scores, no_ops):
    """A fault: dividing by the sum over experts alone gives one expert weight 1, no gradient."""
    layer = layer_of(MoE(2, TokenChoice(2, no_ops=no_ops, scores=scores, renormalise=True)))
    x_BLD = inputs()

    def loss(w_DR):
        return jnp.sum(jnp.sin(call(with_arrays(layer, {"w": w_DR}), x_BLD).x))

    asked = np.array(call(layer, x_BLD).records[""].picked_BL)
    assert np.sum(asked == 1) > 4 * np.sum(asked == 2)
    gradient_DR = jax.jit(jax.grad(loss))(layer.router.w[...])
    assert float(jnp.linalg.norm(gradient_DR)) > 0.1


def test_padding_changes_no_other_row_loss_or_count():
    for spec in CASES.values():
        layer, x_BLD = layer_of(spec), inputs()
        one = call(layer, x_BLD, VALID_BL)
        other = call(layer, jnp.where(VALID_BL[..., None], x_BLD, 7.0), VALID_BL)
        np.testing.assert_array_equal(one.x[np.array(VALID_BL)], other.x[np.array(VALID_BL)])
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one.records, other.records)
        assert (
            all(jax.tree.leaves(same))
            and one.records["rule"].loss() == other.records["rule"].loss()
        )


LONG = ("top 1 with drops", "dropless", "no-ops, dropless")


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, spec in CASES.items()
    ],
)
def test_an_edit_changes_nothing_before_it_but_where_experts_choose(spec):
    layer, x_BLD = layer_of(spec), inputs(4, 24)
    changed = 0
    for t in range(4, 24, 3):
        edited = call(layer, x_BLD.at[:, t].set(9 * x_BLD[:, (t + 5) % 24])).x
        changed += int(jnp.any(edited[:, :t] != call(layer, x_BLD).x[:, :t]))
    assert (changed > 0) == isinstance(spec.rule, ExpertChoice)


def test_choice_major_slots_would_have_leaked():
    """GShard's order serves all first choices before any second one, on the same picks."""
    layer, x_BLD = layer_of(CASES["top 2 of 1.0 with drops"]), inputs(8, 24)
    size = layer.spec.slots(24)

    def kept(x_BLD):
        rows = np.argsort(-np.array(normed(np.array(x_BLD), 1.0) @ layer.router.w[...]), axis=2)[
            :, :, :2
        ]
        count, found = np.zeros((8, 4), int), np.zeros((8, 24, 2), bool)
        for choice in range(2):
            for b in range(8):
                for s in range(24):
                    e = rows[b, s, choice]
                    found[b, s, choice], count[b, e] = count[b, e] < size, count[b, e] + 1
        return found

    edits = (x_BLD.at[:, t].set(9 * x_BLD[:, (t + 5) % 24]) for t in range(4, 24))
    assert any((kept(e)[:, :t] != kept(x_BLD)[:, :t]).any() for t, e in enumerate(edits, 4))


def test_the_router_learns_from_the_stream_at_top_1():
    layer, x_BLD = layer_of(MoE(4, TokenChoice(balance=0.0, z=0.0))), inputs()

    def loss(w_DR):
        return jnp.sum(jnp.sin(call(with_arrays(layer, {"w": w_DR}), x_BLD).x))

    assert jnp.linalg.norm(jax.grad(loss)(layer.router.w[...])) > 0.1


def test_an_expert_without_positions_gets_no_gradient():
    layer, x_BLD = layer_of(MoE(4, TokenChoice(balance=0.0, z=0.0))), jnp.abs(inputs())
    layer.router.w[...] = layer.router.w[...].at[:, 2].set(-9.0)
    params = jax.tree.map(jnp.float32, arrays(layer)[0])
    loss = lambda params: jnp.sum(jnp.sin(call(with_arrays(layer, params), x_BLD).x))  # noqa: E731
    for w_EDF in jax.grad(loss)(params)["experts"].values():
        assert not jnp.any(w_EDF[2]) and jnp.any(w_EDF[1])


def test_integrated_with_one_expert_and_one_no_op_is_token_choice_mod_of_the_mlp():
    layer = layer_of(MoE(1, TokenChoice(no_ops=1, balance=0.0, z=0.0), capacity_factor=1.0))
    mod = build(MoD(Seq(MLP()), capacity=0.5, rule=Binary()), SHAPE, rngs=nnx.Rngs(0))
    mlp = mod.inner.parts["0_mlp"]
    for name in ("w_in", "w_out"):
        getattr(mlp, name)[...] = layer.experts[name][...][0]
    x_BLD = inputs()
    # MoD's router sees the stream, MoE's its norm: on a stream of norm 1 they are the same.
    x_BLD = jnp.float32(normed(np.array(x_BLD), 1.0))
    mod.router.w[...] = layer.router.w[...][:, ::-1]
    ours, theirs = call(layer, x_BLD), call(mod, x_BLD)
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-5)
    taken = np.array(ours.records[""].taken_BL) > 0
    assert (taken == np.array(theirs.records[""].selected_BL)).all() and 0 < taken.mean() < 1


def test_staged_with_one_expert_is_mod():
    x_BLD = inputs()
    staged, plain = (
        build(MoD(Seq(inner), capacity=0.25), SHAPE, rngs=nnx.Rngs(0)) for inner in (MoE(1), MLP())
    )
    for name in ("w_in", "w_out"):
        mlp = getattr(plain.inner.parts["0_mlp"], name)
        staged.inner.parts["0_moe"].experts[name][...] = mlp[...][None]
    staged.router.w[...] = plain.router.w[...]
    np.testing.assert_allclose(call(staged, x_BLD).x, call(plain, x_BLD).x, atol=1e-6)
