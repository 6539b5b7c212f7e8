"""The rules and routers of Skip against formulas of NumPy, and what a Skip reports.

Legend: B batch, L positions, D model width, F MLP width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn import observe
from modjax.nn.routing.skipping import Skipped
from modjax.specs import MLP, Centred, First, MindSkip, MoD, Quantile, Skip, Zero
from tests.nn.skips import TOKENS_BL, D, alone, decisions, forward, numpy_norm, run, skipping_model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("excess", [True, False])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_published_rule_has_the_published_mask_loss_and_gradient(unit, excess):
    rule = MindSkip(penalty=0.7, excess=excess)
    about = {"unit": unit, "router": Zero(), "rule": rule, "capacity": 0.2}
    spec = Skip(MLP("silu"), **about)
    graphdef, weights = alone(spec)
    rng = np.random.default_rng(2)
    x_BLD, c_BLD = rng.normal(size=(2, 4, 5, D))

    def loss(weights):
        out = run(graphdef, weights, jnp.asarray(x_BLD, jnp.float32))
        own = out.records["rule"].loss()
        return jnp.sum(out.x * jnp.asarray(c_BLD, jnp.float32)) + own, (out.x, own)

    gradient, (y_BLD, own) = jax.jit(jax.grad(loss, has_aux=True))(weights)
    w_D = np.asarray(weights["router"]["w"], float)[:, 0]
    w_in, w_out = (np.asarray(weights["inner"][name], float) for name in ("w_in", "w_out"))
    h_BLD = numpy_norm(x_BLD)
    z_BLF = h_BLD @ w_in
    f_BLD = (z_BLF * sigmoid(z_BLF)) @ w_out.T
    # s = sigmoid(w . h_t), or sigmoid(w . mean_t h_t); m = 1 if s >= 0.5.
    pooled_BLD = h_BLD if unit == "token" else np.repeat(h_BLD.mean(1, keepdims=True), 5, axis=1)
    s_BL = sigmoid(pooled_BLD @ w_D)
    m_BL = (s_BL >= 0.5).astype(float)
    assert 0.2 < m_BL.mean() < 1
    np.testing.assert_allclose(y_BLD, x_BLD + m_BL[..., None] * f_BLD, atol=1e-5)
    share = m_BL.mean()
    assert float(own) == pytest.approx(0.7 * (share - 0.2 if excess else share), rel=1e-6)
    # Straight through: the gradient of m is passed on to s as it is.
    dm_BL = np.sum(c_BLD * f_BLD, axis=-1) + 0.7 / m_BL.size
    expected_D = np.einsum("BL,BL,BLD->D", dm_BL, s_BL * (1 - s_BL), pooled_BLD)
    np.testing.assert_allclose(gradient["router"]["w"][:, 0], expected_D, rtol=2e-4, atol=1e-5)


def test_a_share_below_the_capacity_costs_nothing():
    spec = Skip(MLP(), router=Zero(), rule=MindSkip(1.0), capacity=1.0)
    graphdef, weights = alone(spec)
    x_BLD = jax.random.normal(jax.random.key(0), (2, 6, D))
    record = run(graphdef, weights, x_BLD).records["rule"]
    assert float(record.loss()) == 0
    # Of a batch in parts, the share of the whole one decides.
    assert float(record.loss(totals={"share": jnp.float32(2.0)})) < 0


def test_one_threshold_follows_the_quantile_of_all_layers_and_meets_their_capacity():
    graphdef, weights = skipping_model(Skip(MLP(), capacity=0.3), Skip(MLP(), capacity=0.5))
    blocks = weights["stack"]["blocks"]
    for block in blocks.values():
        block["rule"]["threshold"] = np.zeros((2, 1), np.float32)
    segments_BL = np.ones_like(TOKENS_BL)
    segments_BL[0, 9:] = 0  # padding does not count
    _, records = forward(graphdef, weights, segments_BL=segments_BL)
    scores = np.concatenate(
        [
            np.asarray(r.scores_BL)[:, segments_BL > 0].ravel()
            for r in records.values()
            if isinstance(r, Skipped)
        ]
    )
    after, _ = observe(blocks, records, 0, stacked=True)
    thresholds = [np.asarray(block["rule"]["threshold"]).ravel() for block in after.values()]
    quantile = np.sort(scores)[::-1][round(0.4 * len(scores)) - 1]
    np.testing.assert_allclose(thresholds, 0.3 * quantile, rtol=1e-5)
    assert np.mean(scores >= quantile) == pytest.approx(0.4, abs=1 / len(scores))


def updated(weights, records, updates=0):
    """Returns the weights after an update of what is measured."""
    blocks, _ = observe(weights["stack"]["blocks"], records, updates, stacked=True)
    return {**weights, "stack": {**weights["stack"], "blocks": blocks}}


def thresholds_inside(weights):
    return [block["inner"]["rule"]["threshold"] for block in weights["stack"]["blocks"].values()]


def test_layers_within_others_share_a_threshold_whether_or_not_they_repeat():
    layers = [MoD(Skip(MLP(), capacity=c, rule=Quantile(1.0)), capacity=0.5) for c in (0.3, 0.5)]
    graphdef, weights = skipping_model(*layers)
    _, records = forward(graphdef, weights)
    inner = [r.record for r in records.values() if isinstance(getattr(r, "record", 0), Skipped)]
    scores = np.sort(np.concatenate([np.ravel(r.scores_BL) for r in inner]))[::-1]
    expected = scores[round(0.4 * len(scores)) - 1]
    found = thresholds_inside(updated(weights, records))
    assert len(inner) == 2
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5)


def test_positions_that_always_run_are_part_of_the_capacity():
    layer = Skip(MLP(), 0.6, "sequence", causal=First(6), rule=Quantile(rate=1.0))
    graphdef, weights = skipping_model(layer)
    for _ in range(3):  # a layer's scores depend on the layers before it
        _, records = forward(graphdef, weights)
        weights = updated(weights, records)
    ran = np.mean(decisions(records))
    # 36 of 84 always run. Of the rest, 8 in each of 6 rows, 2 rows bring that nearest to 0.6.
    assert ran == pytest.approx((36 + 2 * 8) / 84)


@pytest.mark.parametrize("layer", [Skip(MLP()), MoD(Skip(MLP()), capacity=0.5)])
def test_a_batch_without_a_position_to_decide_about_moves_no_threshold(layer):
    graphdef, weights = skipping_model(layer)
    _, records = forward(graphdef, weights, segments_BL=np.zeros_like(TOKENS_BL))
    for name, block in updated(weights, records)["stack"]["blocks"].items():
        old, new = weights["stack"]["blocks"][name], block
        if "inner" in block and "rule" in block["inner"]:
            old, new = old["inner"], new["inner"]
        np.testing.assert_array_equal(new["rule"]["threshold"], old["rule"]["threshold"])


def test_the_centred_router_subtracts_the_running_mean_of_its_inputs():
    graphdef, weights = alone(Skip(MLP(), router=Centred()))
    weights["router"]["b"] = jnp.array([0.25])
    mean_D = np.random.default_rng(4).normal(size=D).astype(np.float32)
    weights["router"]["mean"] = jnp.asarray(mean_D)
    x_BLD = np.random.default_rng(5).normal(size=(2, 6, D)).astype(np.float32)
    valid_BL = np.arange(6)[None] < np.array([[6], [4]])
    records = run(graphdef, weights, x_BLD, valid_BL=jnp.asarray(valid_BL)).records
    h_BLD = numpy_norm(x_BLD)
    expected_BL = (h_BLD - mean_D) @ np.asarray(weights["router"]["w"])[:, 0] + 10 * 0.25
    np.testing.assert_allclose(records[""].scores_BL, expected_BL, atol=1e-5)
    after, _ = observe(weights, records, 0)
    means_BD = [h_BLD[b][valid_BL[b]].mean(axis=0) for b in range(2)]
    np.testing.assert_allclose(after["router"]["mean"], np.mean(means_BD, axis=0), atol=1e-6)


def test_what_a_skip_ran_is_reported():
    selected = [[[1, 1, 0, 0], [1, 1, 1, 1], [0] * 4], [[0, 0, 0, 0], [1, 0, 0, 0], [1] * 4]]
    selected = np.array(selected, bool)
    wanted, zeros = selected.copy(), np.zeros(selected.shape, np.float32)
    wanted[1, 1, 1] = True
    valid_BL = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    record = Skipped(zeros, jnp.asarray(wanted), jnp.asarray(selected))
    found = Skipped.statistics({"0_skip": record}, jnp.asarray(valid_BL))
    expected = {
        "skip/capacity": (5 / 7 + 1 / 7) / 2,
        "skip/overflow": 1 / 7 / 2,
        "skip/least": 1 / 7,
        "skip/most": 5 / 7,
        "skip/variance": (0.25 + 0 + 0 + 2 / 9) / 4,
    }
    assert {name: float(v) for name, v in found.items()} == pytest.approx(expected)
    by_layer = {
        f"0_skip.{a}": jax.tree.map(
            lambda leaf, a=a: np.asarray(leaf[a]), jax.vmap(lambda r: r.counts(valid_BL))(record)
        )
        for a in range(2)
    }
    outcome = Skipped.outcome(by_layer)
    assert outcome == pytest.approx({n.replace("/", "_"): v for n, v in expected.items()})
