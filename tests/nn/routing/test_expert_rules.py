"""Rules of experts: their losses, biases, thresholds and random no-ops against formulas.

Legend: B batch, S positions, D width, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn.records import statistics
from modjax.specs import ExpertThreshold, MoE, TokenChoice
from tests.nn.layers.moe_by_loop import VALID_BL, B, D, S, call, inputs, layer_of, normed, rows_of


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
    """A fault: averaging over layers before the product reads half for opposite collapses."""
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
    assert abs(float(jnp.mean(out.records[""].picked_BL)) - 0.5) < 0.03
    other = call(layer, -x_BLD)
    assert jnp.array_equal(out.records[""].picked_BL, other.records[""].picked_BL)
    assert not jnp.array_equal(
        out.records[""].picked_BL, call(layer, x_BLD, key=4).records[""].picked_BL
    )
