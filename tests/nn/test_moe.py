"""Mixture of experts against a loop over positions in numpy, and what must hold of any.

Legend: B batch, S positions, D width, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import At, Call, build
from modjax.nn.call import number_rows
from modjax.nn.records import statistics
from modjax.specs import (
    MLP,
    Binary,
    ExpertChoice,
    ExpertThreshold,
    MoD,
    MoE,
    Seq,
    Shape,
    TokenChoice,
)

B, S, D, F = 3, 20, 16, 24
SHAPE = Shape(D, 2, 2, 2, 8, F, 1e-6)
CASES = {
    "top 1 with drops": MoE(4, capacity_factor=0.75),
    "top 2": MoE(4, TokenChoice(2)),
    "top 2 of 1.0 with drops": MoE(4, TokenChoice(2), capacity_factor=1.0),
    "renormalised": MoE(4, TokenChoice(2, renormalise=True), activation="swiglu"),
    "dropless": MoE(4, TokenChoice(2), capacity_factor=None, width=8),
    "as DeepSeek": MoE(
        4, TokenChoice(2, "sigmoid", 2.5, renormalise=True, bias_rate=0.1, balance=0.0), shared=1
    ),
    "no-ops": MoE(4, TokenChoice(no_ops=4), capacity_factor=1.0),
    "no-ops, renormalised": MoE(4, TokenChoice(2, no_ops=2, renormalise=True), norm="both"),
    "no-ops, dropless": MoE(4, TokenChoice(3, no_ops=4), capacity_factor=None, norm="after"),
    "expert choice": MoE(4, ExpertChoice(2), capacity_factor=1.0),
    "threshold": MoE(4, ExpertThreshold(2)),
    "threshold with drops": MoE(4, ExpertThreshold(2), capacity_factor=0.75),
}  # fmt: skip


def rows_of(spec):
    return spec.rule.rows(spec.experts)


def layer_of(spec, seed=0):
    """The layer, with a bias and thresholds that change what is picked."""
    layer = build(spec, SHAPE, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    rule = layer.rule
    if getattr(rule, "bias", None) is not None:
        rule.bias[...] = jnp.float32(0.3 * rng.standard_normal(spec.rule.rows(spec.experts)))
    if hasattr(rule, "threshold"):
        rule.threshold[...] = jnp.float32([0.2, 0.25, 0.3, 0.35][: spec.experts])
    return layer


def inputs(batch=B, length=S, seed=1):
    return jnp.float32(np.random.default_rng(seed).standard_normal((batch, length, D)))


def call(layer, x_BLD, valid_BL=None, routing="trained", key=3):
    positions, rows = jnp.arange(x_BLD.shape[1])[None], number_rows(*x_BLD.shape[:2])
    at = At(positions, None, valid_BL, {}, {}, rows)
    return layer(x_BLD, at, Call(routing, None, jax.random.key(key)))


ACT = {
    "gelu": lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    "swiglu": lambda h: h / (1 + np.exp(-h)),
}


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def mlp(y, of, activation):
    h = y @ of["w_in"]
    h = ACT[activation](y @ of["w_gate"]) * h if "w_gate" in of else ACT[activation](h)
    return h @ of["w_out"].T


def by_loop(spec, params, measured, x_BLD, valid_BL=None, routing="trained"):
    """The stream after the layer, in float64, and what was dropped; position by position."""
    out, dropped, rule = np.array(x_BLD, float), 0, spec.rule
    for b, x_LD in enumerate(np.array(x_BLD, float)):
        y_LD = normed(x_LD, params["norm"]) if "norm" in params else x_LD
        logits = y_LD @ params["w"]
        e = np.exp(logits - logits.max(1, keepdims=True))
        scores = 1 / (1 + np.exp(-logits)) if rule.scores == "sigmoid" else e / e.sum(1)[:, None]
        valid = np.ones(len(x_LD), bool) if valid_BL is None else np.array(valid_BL[b])
        limit = spec.slots(int(valid.sum())) if routing == "trained" else len(x_LD)
        count = np.zeros(spec.experts, int)
        best = np.argsort(np.where(valid, scores.T, -1), axis=1)[:, ::-1][:, :limit]
        for s in range(len(x_LD)):
            if not valid[s]:
                continue
            if isinstance(rule, TokenChoice):
                ranking = scores[s] + measured.get("bias", 0)
                rows = np.argsort(-ranking)[: rule.top_k]
                picks = [r for r in rows if r < spec.experts]
            elif isinstance(rule, ExpertThreshold):
                picks = np.flatnonzero(scores[s] > measured["threshold"])
            else:
                picks = [r for r in range(spec.experts) if s in best[r]]
            weights = np.array([scores[s, r] for r in picks])
            if getattr(
                rule, "renormalise", False
            ):  # by all picks, as LongCat's router does: no-ops among them
                weights = weights / scores[s, rows].sum()
            z = np.zeros(D)
            for r, weight in zip(picks, rule.scale * weights, strict=True):
                count[r] += 1
                if count[r] > limit:
                    dropped += 1
                    continue
                of = {name: w[r] for name, w in params["experts"].items()}
                z = z + weight * mlp(y_LD[s], of, spec.activation)
            if spec.shared:
                z = z + mlp(y_LD[s], params["shared"], spec.activation)
            out[b, s] += normed(z, params["norm_after"]) if "norm_after" in params else z
    return out, dropped


def arrays(layer):
    """Its parameters by name, and what it measures."""
    params = {"w": layer.router.w[...], "experts": {n: w[...] for n, w in layer.experts.items()}}
    for name in ("norm", "norm_after"):
        if getattr(layer, name) is not None:
            params[name] = getattr(layer, name).scale[...]
    if layer.shared is not None:
        params["shared"] = {name: w[...] for name, w in layer.shared.items()}
    measured = {n: np.array(getattr(layer.rule, n)[...], float) for n in ("bias", "threshold")
                if getattr(layer.rule, n, None) is not None}  # fmt: skip
    return jax.tree.map(lambda p: np.array(p, float), params), measured


def with_arrays(layer, params):
    """The same layer with other parameters, which may be traced."""
    graphdef, state = nnx.split(layer)
    values = nnx.to_pure_dict(state)
    values["router"]["w"] = params["w"]
    for group in ("experts", "shared"):
        if group in params:
            values[group] = params[group]
    for name in ("norm", "norm_after"):
        if name in params:
            values[name] = {"scale": params[name]}
    return nnx.merge(graphdef, values)


VALID_BL = jnp.arange(S)[None] < jnp.array([S, 13, 0])[:, None]


@pytest.mark.parametrize("valid_BL", [None, VALID_BL], ids=["full", "padded"])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_equals_a_loop_over_positions(spec, valid_BL):
    layer, x_BLD = layer_of(spec), inputs()
    out = call(layer, x_BLD, valid_BL)
    expected_BLD, dropped = by_loop(spec, *arrays(layer), x_BLD, valid_BL)
    valid = np.ones((B, S), bool) if valid_BL is None else np.array(valid_BL)
    np.testing.assert_allclose(out.x[valid], expected_BLD[valid], atol=2e-5)
    record = out.records[""]
    assert int(jnp.sum(record.asked_BL - record.taken_BL)) == dropped
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
    assert dropped == 0 and jnp.array_equal(many.records[""].asked_BL, many.records[""].taken_BL)
    few = call(layer, x_BLD[:, :4], routing="causal")  # expert by expert
    np.testing.assert_allclose(few.x, many.x[:, :4], atol=1e-5)
    layer.take_apart()
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
    assert jnp.array_equal(out.records[""].asked_BL, out.records[""].taken_BL)


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_every_pick_is_accounted_for(spec):
    records = call(layer_of(spec), inputs(), VALID_BL).records
    record = records[""]
    stacked = jax.tree.map(lambda z: z[None], {f"a/{name}": one for name, one in records.items()})
    found = {name: float(v) for name, v in statistics(stacked).items()}
    asked, taken, picks, computed = (
        np.array(z) for z in (record.asked_BL, record.taken_BL, record.picks_B, record.computed_B)
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
    """Divided by the sum over experts alone, one expert weighs 1 and the gradient is nothing."""
    layer = layer_of(MoE(2, TokenChoice(2, no_ops=no_ops, scores=scores, renormalise=True)))
    x_BLD = inputs()

    def loss(w_DR):
        return jnp.sum(jnp.sin(call(with_arrays(layer, {"w": w_DR}), x_BLD).x))

    asked = np.array(call(layer, x_BLD).records[""].asked_BL)
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
    """The order of GShard, all first choices before any second one, on the same picks."""
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


@pytest.mark.parametrize(
    "spec",
    [
        MoE(4),
        MoE(4, TokenChoice(2)),
        MoE(4, TokenChoice(no_ops=4)),
        MoE(4, TokenChoice(scores="sigmoid")),
    ],
)
def test_the_balance_loss_is_1_at_uniform(spec):
    layer = layer_of(spec)
    layer.router.w[...] = jnp.zeros_like(layer.router.w[...])
    np.testing.assert_allclose(
        call(layer, inputs()).records["rule"].losses()["balance"], 1.0, rtol=1e-6
    )
    layer.router.w[...] = (
        40 * jnp.eye(D)[:, : rows_of(spec)]
    )  # positions that pick the rows in turn, surely
    x_BLD = jnp.tile(jnp.eye(D)[None, : rows_of(spec)], (B, 5, 1))
    if spec.rule.top_k == 1 and spec.rule.scores == "softmax":
        np.testing.assert_allclose(
            call(layer, x_BLD).records["rule"].losses()["balance"], 1.0, rtol=1e-3
        )


def test_the_balance_loss_is_the_number_of_rows_at_collapse_in_each_layer_by_itself():
    """Averaged over layers before the product, two opposite collapses would read half as much."""
    layers = [layer_of(MoE(4)) for _ in range(2)]
    for i, layer in enumerate(layers):
        layer.router.w[...] = jnp.zeros((D, 4)).at[:, i].set(50.0)
    records = [call(layer, jnp.ones((B, S, D))).records["rule"] for layer in layers]
    found = statistics({"a/rule": jax.tree.map(lambda *z: jnp.stack(z), *records)})
    np.testing.assert_allclose(found["moe/balance"], 4.0, rtol=1e-6)
    np.testing.assert_allclose(found["loss/moe_balance"], 2 * 0.01 * 4, rtol=1e-6)


def test_the_load_is_averaged_over_layers_with_other_rules_too():
    rules = (TokenChoice(), ExpertThreshold())
    records = [call(layer_of(MoE(4, rule)), inputs()).records["rule"] for rule in rules]
    stacked = {f"{i}/rule": jax.tree.map(lambda z: z[None], r) for i, r in enumerate(records)}
    each = [float(record.losses()["balance"]) for record in records]
    assert abs(each[0] - each[1]) > 1e-3
    np.testing.assert_allclose(statistics(stacked)["moe/balance"], np.mean(each), rtol=1e-6)


def test_losses_against_their_formulas():
    spec = MoE(4, TokenChoice(2, balance=0.3, z=0.2), capacity_factor=0.5)
    layer, x_BLD = layer_of(spec), inputs()
    record = call(layer, x_BLD, VALID_BL).records["rule"]
    valid = np.array(VALID_BL)
    logits_NE = normed(np.array(x_BLD, float)[valid], 1.0) @ np.array(layer.router.w[...], float)
    p_NE = np.exp(logits_NE) / np.exp(logits_NE).sum(1, keepdims=True)
    picks = np.argsort(-logits_NE, axis=1)[:, :2]
    f_E = np.bincount(picks.ravel(), minlength=4) / picks.size  # before drops
    z = np.mean(np.log(np.exp(logits_NE).sum(1)) ** 2)
    expected = 0.3 * 4 * np.sum(f_E * p_NE.mean(0)) + 0.2 * z
    np.testing.assert_allclose(record.loss(), expected, rtol=1e-5)


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


def test_the_bias_moves_against_the_load_and_is_never_in_the_weight():
    layer, x_BLD = layer_of(MoE(4, TokenChoice(bias_rate=0.1))), inputs()
    record = call(layer, x_BLD).records["rule"]
    load = np.array(record.picks_BR).sum(0)
    moved = record.observed({"bias": layer.rule.bias[...]}, jnp.int32(3))["bias"]
    expected = np.array(layer.rule.bias[...]) + 0.1 * np.sign(load.mean() - load)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    before = call(layer, x_BLD).x
    layer.rule.bias[...] = layer.rule.bias[...] + 5.0  # of all rows alike
    np.testing.assert_array_equal(call(layer, x_BLD).x, before)


def test_thresholds_follow_the_mean_score_that_ranks_each_experts_share():
    layer, x_BLD = layer_of(MoE(4, ExpertThreshold(2))), inputs()
    record = call(layer, x_BLD, VALID_BL).records["rule"]
    y = normed(np.array(x_BLD, float), 1.0) @ np.array(layer.router.w[...], float)
    p = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    # Experts' shares of 20 and 13 positions: 2 * 20 / 4 = 10 and 2 * 13 / 4 = 6.5, rounded to 6.
    kth = [np.sort(p[b][:n], axis=0)[::-1][k - 1] for b, n, k in ((0, S, 10), (1, 13, 6))]
    old = np.array(layer.rule.threshold[...], float)
    found = record.observed({"threshold": layer.rule.threshold[...]}, jnp.int32(3))["threshold"]
    np.testing.assert_allclose(found, old + (np.mean(kth, axis=0) - old) / 4, rtol=1e-5)


def test_random_no_ops_are_as_many_and_depend_on_key_row_and_position_alone():
    spec = MoE(4, TokenChoice(no_ops=4, random_no_ops=True), capacity_factor=None)
    layer, x_BLD = layer_of(spec), inputs(8, 200)
    out = call(layer, x_BLD)
    assert abs(float(jnp.mean(out.records[""].asked_BL)) - 0.5) < 0.03
    other = call(layer, -x_BLD)
    assert jnp.array_equal(out.records[""].asked_BL, other.records[""].asked_BL)
    assert not jnp.array_equal(
        out.records[""].asked_BL, call(layer, x_BLD, key=4).records[""].asked_BL
    )


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
