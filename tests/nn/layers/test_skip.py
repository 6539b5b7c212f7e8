"""Skip against plain loops and formulas of NumPy, and its decisions in every kind of pass.

Legend: B batch, L positions, D model width, N heads, V vocabulary.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.checks.look_ahead import probe
from modjax.errors import InputError
from modjax.flops import cache_bytes, forward_flops, total_flops
from modjax.nn import At, Call, Transformer, observe
from modjax.nn import build as build_layer
from modjax.nn.routing.skipping import Skipped
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Centred,
    Dense,
    First,
    MindSkip,
    MoD,
    ModelSpec,
    MoE,
    Prompt,
    Quantile,
    Recycled,
    RunningMean,
    Seq,
    Skip,
    StrideSkip,
    TokenChoice,
    Zero,
)
from tests.nn.small import QUICK, key_values, random_model
from tests.nn.small import build as build_model

D, LENGTH, PROMPT = 8, 14, 6
SMALL = ModelSpec(20, D, 2, 2, 1, 16)
UNITS = {
    "token": {},
    "prompt": {"unit": "sequence"},
    "mean": {"unit": "sequence", "causal": RunningMean()},
    "first": {"unit": "sequence", "causal": First(4)},
}
INNER = {"attention": Attention(), "mlp": MLP(), "block": Dense()}
TOKENS_BL = np.random.default_rng(0).integers(0, 20, (3, LENGTH))
PROMPT_BL = np.broadcast_to(np.arange(LENGTH) < PROMPT, TOKENS_BL.shape)


def alone(spec, *, d_ff=16):
    """Returns a Skip of width D with random routers, and its weights."""
    shape = dataclasses.replace(SMALL, layers=(spec,), d_ff=d_ff).shape
    graphdef, state = nnx.split(build_layer(spec, shape, rngs=nnx.Rngs(0)))
    weights = nnx.to_pure_dict(state)
    router = np.random.default_rng(1).normal(size=(D, 1)).astype(np.float32)
    weights["router"]["w"] = jnp.asarray(router)
    return graphdef, weights


@functools.partial(jax.jit, static_argnames=("graphdef", "routing"))
def run(graphdef, weights, x_BLD, routing="trained", valid_BL=None):
    batch, length, _ = x_BLD.shape
    positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
    at = At(positions_BL, None, valid_BL, {}, {})
    return nnx.merge(graphdef, weights)(x_BLD, at, Call(routing))


@functools.partial(jax.jit, static_argnames=("graphdef", "routing"))
def forward(graphdef, weights, routing="trained", segments_BL=None):
    return nnx.merge(graphdef, weights)(TOKENS_BL, segments_BL, routing=routing)


def numpy_norm(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + SMALL.norm_eps)


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


@pytest.mark.parametrize("spec", [Skip(Dense()), Skip(Dense(), router=Zero(), rule=MindSkip())])
def test_the_first_step_is_exactly_the_inner_model(spec):
    skipping = dataclasses.replace(SMALL, layers=(spec,))
    graphdef, state = build_model(skipping)
    plain_graphdef, plain = build_model(SMALL)
    weights = nnx.to_pure_dict(state)
    block = weights["stack"]["blocks"]["0_skip"]
    block["inner"] = nnx.to_pure_dict(plain)["stack"]["blocks"]["0_seq"]
    for name in ("embed", "unembed", "final_norm"):
        weights[name] = nnx.to_pure_dict(plain)[name]
    block["router"]["w"] = jnp.zeros_like(block["router"]["w"])
    ours = {r: forward(graphdef, weights, r)[0] for r in ("trained", "all")}
    theirs = forward(plain_graphdef, plain)[0]
    for logits in ours.values():
        np.testing.assert_array_equal(logits, theirs)


@pytest.mark.parametrize("keys", ["all", "routed"])
def test_queries_of_selected_positions_see_the_keys_that_they_should(keys):
    spec = Skip(Attention(rope=None), keys=keys, router=Zero())
    graphdef, weights = alone(spec)
    x_BLD = np.random.default_rng(3).normal(size=(3, 9, D)).astype(np.float32)
    h_BLD = numpy_norm(x_BLD.astype(float))
    m_BL = h_BLD @ np.asarray(weights["router"]["w"], float)[:, 0] >= 0
    inner = {name: np.asarray(w, float) for name, w in weights["inner"].items() if name != "norm"}
    expected_BLD = x_BLD.astype(float)
    for b, t in np.argwhere(m_BL):
        seen = [j for j in range(t + 1) if keys == "all" or m_BL[b, j]]
        h_JD = h_BLD[b, seen]
        for n in range(2):
            scores_J = h_JD @ inner["w_k"][:, 0] @ (h_BLD[b, t] @ inner["w_q"][:, n]) / 2
            p_J = np.exp(scores_J) / np.exp(scores_J).sum()
            expected_BLD[b, t] += p_J @ (h_JD @ inner["w_v"][:, 0]) @ inner["w_out"][n]
    assert 0.2 < m_BL.mean() < 0.8
    for routing in ("trained", "threshold"):
        out = run(graphdef, weights, x_BLD, routing)
        np.testing.assert_allclose(out.x, expected_BLD, atol=1e-5)
        np.testing.assert_array_equal(out.records[""].selected_BL, m_BL)


@pytest.mark.parametrize("keys", ["all", "routed"])
def test_experts_inside_count_the_positions_that_run_only(keys):
    graphdef, weights = alone(Skip(MoE(2, TokenChoice(1)), keys=keys))
    x_BLD = jax.random.normal(jax.random.key(0), (2, 6, D))
    records = dict(run(graphdef, weights, x_BLD).records)
    ran = int(records.pop("").selected_BL.sum())
    counted = [record.counts(jnp.ones((2, 6), bool)) for record in records.values()]
    assert 0 < ran < 12
    assert [int(sum(found["picks"])) for found in counted if found] == [ran]


def skipping_model(*layers, seed=0, **changes):
    """Returns a model with random weights, whose routers decide by content."""
    spec = dataclasses.replace(SMALL, layers=layers, num_layers=2 * len(layers), **changes)
    return random_model(spec, seed=seed)


@functools.partial(jax.jit, static_argnames=("graphdef", "slack"), compiler_options=QUICK)
def every_pass(graphdef, weights, tokens_BL, prompt_BL, slack=None):
    """Returns logits as trained, of a causal pass, and of cached reading in turns, with records."""
    model = nnx.merge(graphdef, weights)
    passes = [
        model(tokens_BL, prompt_BL=prompt_BL, routing=routing, slack=slack)
        for routing in ("trained", "causal")
    ]
    read = model.reader(max_length=LENGTH, routing="causal", slack=slack)
    found, cache = [], None
    # The prompt, a turn of which each row reads all but the last token, and single tokens.
    for start, stop in ((0, PROMPT), (PROMPT, LENGTH - 2), (LENGTH - 2, LENGTH - 1)):
        lengths_B = jnp.full(tokens_BL.shape[0], stop - start)
        logits_BV, cache, _ = read(tokens_BL[:, start:stop], lengths_B, cache)
        found.append(logits_BV)
    return passes, jnp.stack(found, axis=1), cache


def decisions(records):
    return [r.selected_BL for r in records.values() if isinstance(r, Skipped)]


DEFAULT = [("block", "token", "all"), ("attention", "prompt", "routed"), ("mlp", "first", "all")]
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow)
    for case in itertools.product(INNER, UNITS, ("all", "routed"))
    if case[0] != "mlp" or case[2] == "all"
]


@pytest.mark.parametrize("inner, unit, keys", CASES)
def test_training_causal_passes_and_cached_reading_decide_and_compute_alike(inner, unit, keys):
    layer = Skip(INNER[inner], keys=keys, **UNITS[unit])
    graphdef, weights = skipping_model(layer if inner != "mlp" else Seq(Attention(), layer))
    passes, read_BTV, _ = every_pass(graphdef, weights, TOKENS_BL, jnp.asarray(PROMPT_BL))
    (trained, records), (causal, others) = passes
    shares = [float(jnp.mean(d)) for d in decisions(records)]
    assert all(0.1 < share < 0.95 for share in shares), shares
    for ours, theirs in zip(decisions(records), decisions(others), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(causal, trained, atol=2e-5)
    ends = [PROMPT - 1, LENGTH - 3, LENGTH - 2]
    np.testing.assert_allclose(read_BTV, trained[:, ends], atol=2e-5)


@pytest.mark.parametrize(
    "layer, changes",
    [
        (MoD(Skip(Dense(), unit="sequence", causal=RunningMean()), capacity=0.5), {}),
        pytest.param(
            Seq(Skip(Attention()), MoE(2, TokenChoice(1), capacity_factor=None)),
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(AltUp(Skip(Dense())), {"streams": Recycled(2)}, marks=pytest.mark.slow),
        pytest.param(
            Skip(AltUp(), keys="routed"), {"streams": Recycled(2)}, marks=pytest.mark.slow
        ),
    ],
)
def test_it_composes(layer, changes):
    graphdef, weights = skipping_model(layer, **changes)
    passes, read_BTV, _ = every_pass(graphdef, weights, TOKENS_BL, None)
    (_, records), (causal, _) = passes
    ends = [PROMPT - 1, LENGTH - 3, LENGTH - 2]
    np.testing.assert_allclose(read_BTV, causal[:, ends], atol=2e-5)
    blocks = weights["stack"]["blocks"]
    after, updated = observe(blocks, records, 0, stacked=True)
    moved = [
        path
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(blocks), strict=True
        )
        if not np.array_equal(new, old)
    ]
    assert updated > 0 and any("threshold" in jax.tree_util.keystr(path) for path in moved)


def test_a_bound_on_positions_drops_and_counts_the_last_ones():
    graphdef, weights = skipping_model(Skip(Dense(), capacity=0.2, keys="routed"))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, w: w - 9 if "threshold" in jax.tree_util.keystr(path) else w, weights
    )
    passes, _, cache = every_pass(graphdef, weights, TOKENS_BL, None, slack=1.0)
    _, (_, records) = passes
    (own,) = (record for record in records.values() if isinstance(record, Skipped))
    slots = 3  # 0.2 of 14
    expected_L = np.arange(LENGTH) < slots
    np.testing.assert_array_equal(own.selected_BL, np.broadcast_to(expected_L, (2, 3, LENGTH)))
    np.testing.assert_array_equal(cache.overflow_B, [2 * (LENGTH - 1 - slots)] * 3)


def test_a_skipped_step_reads_no_weight_of_the_inner_layer():
    graphdef, weights = skipping_model(Skip(Dense()))

    def broken(path, w):
        name = jax.tree_util.keystr(path)
        if "threshold" in name:
            return np.full_like(w, np.inf)
        # The keys of skipped positions are cached, so their weights are read.
        kept = any(part in name for part in ("w_k", "w_v", "norm", "router", "rule"))
        return w if kept or "inner" not in name else np.full_like(w, np.nan)

    weights = jax.tree_util.tree_map_with_path(broken, weights)
    _, read_BTV, _ = every_pass(graphdef, weights, TOKENS_BL[:1], None)
    assert np.isfinite(read_BTV).all()


def test_caches_have_the_bytes_that_are_counted_and_shrink_with_routed_keys():
    found = {}
    for keys in ("all", "routed"):
        spec = dataclasses.replace(SMALL, layers=(Skip(Dense(), capacity=0.25, keys=keys),))
        graphdef, weights = build_model(spec)
        read = nnx.merge(graphdef, weights).reader(max_length=40, routing="causal", slack=1.0)
        make = functools.partial(read, np.zeros((1, 2), int), jnp.full(1, 2), None)
        caches = key_values(jax.eval_shape(make)[1].layers)
        found[keys] = sum(c.k_BGWH.size + c.v_BGWH.size for c in caches) * 4
        assert found[keys] == cache_bytes(spec, 40, 1.0)
    assert found["routed"] * 4 == found["all"]


@pytest.mark.parametrize("inner, keys", [("attention", "all"), ("block", "routed")])
def test_flops_are_those_that_xla_counts(inner, keys):
    # A slack of 1 has one bucket, which holds the capacity. As trained, everything is computed.
    layer = Skip(INNER[inner], capacity=0.25, keys=keys)
    layers = (layer if inner == "block" else Seq(layer, MLP()),)
    spec = ModelSpec(64, 512, 1, 8, 2, 1536, layers=layers)
    model = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    for routing, slack, trains in (("trained", None, True), ("causal", 1.0, False)):

        def logits(params, tokens, routing=routing, slack=slack):
            model = nnx.merge(graphdef, params)
            return model(tokens, routing=routing, slack=slack)[0]

        step = jax.jit(logits).lower(params, tokens).compile(QUICK)
        counted = step.cost_analysis()["flops"]
        expected = 2 * total_flops(forward_flops(spec, 128, trains=trains))
        assert expected == pytest.approx(counted, rel=0.04)


@pytest.mark.parametrize(
    "unit",
    ["token", *(pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS if unit != "token")],
)
def test_what_it_claims_not_to_see_it_does_not_see(unit):
    layers = (Skip(Dense(), **UNITS[unit]),)
    findings = probe(dataclasses.replace(SMALL, layers=layers, num_layers=1), LENGTH)
    claims = {one.routing: one.claims for one in findings}
    assert claims.pop("trained") == (unit != "prompt") and all(claims.values())
    assert not [one for one in findings if one.claims and one.leak is not None]


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


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Skip(capacity=0), r"Skip.capacity = 0: must be in \(0, 1\]"),
        (lambda: Skip(unit="row"), "Skip.unit = 'row': must be one of token, sequence"),
        (lambda: Skip(keys="none"), "Skip.keys = 'none': must be one of all, routed"),
        (lambda: Skip(rule=Quantile(rate=0.0)), "Quantile.rate = 0.0: must be in"),
        (lambda: Skip(causal=First(0)), "First.size = 0: must be greater than 0"),
        (
            lambda: dataclasses.replace(SMALL, layers=(Skip(Seq(MLP(), Attention())),)),
            "Skip.keys = 'all': must be routed: .* is not alone and first",
        ),
        (
            lambda: dataclasses.replace(SMALL, layers=(Skip(MoD(Dense())),)),
            "Skip.keys = 'all': must be routed",
        ),
        (
            lambda: dataclasses.replace(SMALL, layers=(Skip(StrideSkip(MLP())),)),
            r"Skip.inner = 'StrideSkip\(MLP\(\)\)': must have no layer that takes every k-th",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_its_text_is_read_back():
    layers = (
        Skip(Dense(), capacity=0.25, unit="sequence", keys="routed", causal=First(8)),
        Skip(MLP(), router=Zero(), rule=MindSkip(penalty=0.5, excess=False)),
        Skip(unit="sequence", causal=Prompt()),
    )
    text = ", ".join(map(str, layers))
    assert dataclasses.replace(SMALL, layers=text, num_layers=3).layers == layers
