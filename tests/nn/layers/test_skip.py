"""Skip against plain loops, and its decisions in every kind of pass.

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
from modjax.nn import Transformer, observe
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
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
from tests.nn.skips import (
    LENGTH,
    SMALL,
    TOKENS_BL,
    D,
    alone,
    decisions,
    forward,
    numpy_norm,
    run,
    skipping_model,
)
from tests.nn.small import QUICK, key_values
from tests.nn.small import build as build_model

PROMPT = 6
UNITS = {
    "token": {},
    "prompt": {"unit": "sequence"},
    "mean": {"unit": "sequence", "causal": RunningMean()},
    "first": {"unit": "sequence", "causal": First(4)},
}
INNER = {"attention": Attention(), "mlp": MLP(), "block": Dense()}
PROMPT_BL = np.broadcast_to(np.arange(LENGTH) < PROMPT, TOKENS_BL.shape)


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
    (_, (_, records)), _, cache = every_pass(graphdef, weights, TOKENS_BL, None, slack=1.0)
    (selected,) = decisions(records)
    slots = 3  # 0.2 of 14
    expected_L = np.arange(LENGTH) < slots
    np.testing.assert_array_equal(selected, np.broadcast_to(expected_L, (2, 3, LENGTH)))
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
