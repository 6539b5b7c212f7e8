"""Every kind of router against plain numpy: what it selects, how it weighs, what it loses.

Legend: B batch, L positions, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.kernels import Side, received_attention
from modjax.nn import At, Call, MoDBlock, TokenLoss, losses, observe
from modjax.nn import build as build_module
from modjax.nn.layers.attention import rotary_tables
from modjax.nn.routing.routed import Learnt
from modjax.nn.routing.selection import position_noise
from modjax.specs import (
    Binary,
    Causal,
    Dense,
    MoD,
    MoDConfig,
    ModelSpec,
    Positional,
    Predictor,
    Shape,
    TopK,
)
from tests.nn.small import QUICK, RECEIVED, SCHEMES, WIDTH, Mixer, build, random_model, scheme

BATCH, LENGTH, K = 3, 16, 4
CONFIG = MoDConfig(capacity=K / LENGTH, causal=Predictor(weight=2.0))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
VALID = np.arange(LENGTH) < np.array([[LENGTH], [11], [2]])
KS = (K, 3, 1)  # a quarter of each row's positions: 16 / 4, 11 / 4 and 2 / 4, but one at least


def run_block(name, x=X, edit=lambda block: None, config=CONFIG, **arguments):
    """The block that selects in a way of SCHEMES, its output and its record."""
    rngs = nnx.Rngs(0)
    config = dataclasses.replace(config, **SCHEMES[name])
    block = MoDBlock(Mixer(rngs), WIDTH, config, rngs=rngs)
    edit(block)
    graphdef, params = nnx.split(block)
    routing = arguments.pop("routing", "trained")
    slots = arguments.pop("slots", None)
    call = jax.jit(
        lambda params, x, arguments: nnx.merge(graphdef, params)(
            x, routing=routing, slots=slots, **arguments
        ),
        compiler_options=QUICK,
    )
    y, record = jax.device_get(call(params, x, arguments))
    return block, y, record


def plain_mixer(x, w):
    count = np.arange(1, len(x) + 1)[:, None]
    return x + np.tanh(np.cumsum(x, axis=0) / count) @ w


def plain_block(block, weights, selected, x=X):
    """x + weight * (f(x) - x) at the selected positions of each row, which f alone sees."""
    y = x.astype(np.float64)
    w = np.asarray(block.inner.w[...], np.float64)
    for b, row in enumerate(selected):
        f = plain_mixer(y[b, row], w)
        y[b, row] += weights[b, row][:, None] * (f - y[b, row])
    return y


def best_k(ranking, valid):
    """Membership in the best quarter of each row's valid positions."""
    mask = np.zeros_like(valid)
    for b in range(len(ranking)):
        order = [i for i in np.argsort(-ranking[b]) if valid[b, i]]
        mask[b, order[: max(1, round(K / LENGTH * len(order)))]] = True
    return mask


def first_k(wanted, k):
    """k: of all rows, or of each."""
    return wanted & (np.cumsum(wanted, axis=1) <= np.reshape(k, (-1, 1)))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def masked_mean(x, valid):
    return np.array([row[keep].mean() for row, keep in zip(x, valid, strict=True)])


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_token_choice_equals_numpy_in_output_and_losses():
    rule = Binary(balance=3.0, z=0.5)
    block, y, record = run_block("expert_choice", config=MoDConfig(capacity=0.25, rule=rule),
                                 valid_BL=VALID)  # fmt: skip
    logits = X @ np.asarray(block.router.w[...])
    probability = np.exp(logits[..., 1]) / np.exp(logits).sum(axis=-1)
    wanted = (probability > 0.5) & VALID
    selected = first_k(wanted, KS)
    assert np.any(wanted & ~selected)
    np.testing.assert_array_equal(record.wanted_BL, wanted)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, probability, selected))

    losses = record.own["rule"].losses
    f, p, c = masked_mean(wanted, VALID), masked_mean(probability, VALID), 0.25
    assert_close(losses["balance"], 3 * ((1 - f) * (1 - p) / (1 - c) + f * p / c))
    z = np.square(np.log(np.exp(logits).sum(axis=-1)))
    assert_close(losses["z"], 0.5 * masked_mean(z, VALID))


def test_balance_loss_is_one_where_choices_and_probabilities_equal_the_capacity():
    at = At(jnp.arange(4)[None], None, None, {}, {})

    def balance(probabilities, capacity=0.25):
        shape = Shape(2, 1, 1, 1, 2, 2, 1e-6)
        rule = build_module(Binary(balance=1.0), shape, rngs=nnx.Rngs(0), capacity=capacity)
        odds = jnp.log(jnp.array([probabilities]) / (1 - jnp.array([probabilities])))
        choice = rule.choose(jnp.stack([jnp.zeros_like(odds), odds], -1), at, Call())
        return float(rule.report(odds, choice, None, at).losses["balance"][0])

    assert balance([0.7, 0.1, 0.1, 0.1]) == pytest.approx(1, rel=1e-5)
    # At capacity 1 every choice is as balanced as any other.
    assert balance([0.7, 0.1, 0.1, 0.1], 1.0) == balance([0.9, 0.9, 0.9, 0.9], 1.0) == 1
    assert balance([0.9, 0.9, 0.9, 0.9]) > balance([0.7, 0.7, 0.1, 0.1]) > 1


@pytest.mark.parametrize("name, routing", [("positional", "trained"), ("expert_choice", "causal")])
def test_positional_routing_takes_every_fourth_and_weighs_it_by_the_score(name, routing):
    config = dataclasses.replace(CONFIG, causal=Positional())
    block, y, record = run_block(name, config=config, routing=routing, valid_BL=VALID)
    selected = np.zeros_like(VALID)
    selected[:, 3::4] = True
    selected &= VALID
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, X @ np.asarray(block.router.w[..., 0]), selected))


def test_learned_positions_are_the_same_in_every_row_and_for_any_content():
    block, y, record = run_block("learned_position")
    frequency = 10_000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    angle = np.arange(LENGTH)[:, None] * frequency
    phi = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    scores = np.tile(phi @ np.asarray(block.router.w[..., 0]), (BATCH, 1))
    assert_close(record.scores_BL, scores)
    selected = best_k(scores, np.ones_like(VALID))
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, scores, selected))
    other = run_block("learned_position", x=-X[::-1])[2]
    np.testing.assert_array_equal(other.selected_BL, selected)


def test_stochastic_routing_takes_the_k_loudest_positions_and_weighs_them_by_the_score():
    key = jax.random.key(4)
    block, y, record = run_block("stochastic", key=key, valid_BL=VALID)
    rows, positions = np.indices((BATCH, LENGTH))
    selected = best_k(np.asarray(position_noise(key, rows, positions)), VALID)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, X @ np.asarray(block.router.w[..., 0]), selected))


def test_a_threshold_selects_exactly_what_scores_above_it_up_to_its_slack():
    def set_threshold(block):
        block.rule.threshold[...] = jnp.array([0.5])

    block, y, record = run_block("threshold", edit=set_threshold, valid_BL=VALID)
    scores = X @ np.asarray(block.router.w[..., 0])
    wanted = (scores > 0.5) & VALID
    room = (6, 4, 1)  # 1.5 times a quarter of 16, 11 and 2 positions
    selected = first_k(wanted, room)
    assert np.any(wanted & ~selected) and np.any(wanted.sum(axis=1) < room)
    np.testing.assert_array_equal(record.wanted_BL, wanted)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, scores, selected))
    # What the threshold is to become: the k-th best score.
    for b, k in enumerate(KS):
        assert record.own["rule"].kth_B[b] == pytest.approx(
            np.sort(scores[b, VALID[b]])[-k], rel=1e-5
        )


def test_expert_choice_knows_the_kth_score_of_each_row_that_is_not_all_padding():
    valid = VALID.copy()
    valid[2] = False
    block, _, record = run_block("expert_choice", valid_BL=valid)
    scores = X @ np.asarray(block.router.w[..., 0])
    np.testing.assert_array_equal(record.selected_BL, best_k(scores, valid))
    for b in (0, 1):
        assert record.own["rule"].kth_B[b] == pytest.approx(
            np.sort(scores[b, valid[b]])[-KS[b]], rel=1e-5
        )
    assert not np.isfinite(record.own["rule"].kth_B[2])


def test_thresholds_are_the_plain_mean_at_first_and_then_forget_at_one_in_a_hundred():
    old = np.array([[0.5], [-2.0]], np.float32)
    rule = {"threshold": jnp.asarray(old)}
    blocks = {"1_mod": {"rule": rule, "inner": jnp.ones((2, 3))}, "0_seq": {}}
    kth = np.array([[1.0, 2.0, np.inf], [np.inf, np.inf, -np.inf]], np.float32)
    records = {"1_mod/rule": Learnt({}, kth_B=jnp.asarray(kth))}
    for updates, rate in ((0, 1.0), (1, 0.5), (3, 0.25), (99, 0.01), (10_000, 0.01)):
        new, count = observe(blocks, records, jnp.int32(updates), stacked=True)
        assert count == 2
        # No row of the second repetition knows its k-th score.
        expected = [[0.5 + rate * (1.5 - 0.5)], [-2.0]]
        np.testing.assert_allclose(new["1_mod"]["rule"]["threshold"], expected, rtol=1e-6)
        assert new["1_mod"]["inner"] is blocks["1_mod"]["inner"] and new["0_seq"] == {}


# Attention received, for A-MoD.


def plain_received(q, k, segments):
    """Mean over heads of each column's sum, over what uniform attention would sum to."""
    batch, heads, length, width = q.shape
    received, uniform = np.zeros((batch, length)), np.zeros((batch, length))
    for b, n, i in np.ndindex(batch, heads, length):
        seen = [j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]]
        scores = np.array([q[b, n, i] @ k[b, n * k.shape[1] // heads, j] for j in seen])
        p = np.exp(scores / np.sqrt(width))
        received[b, seen] += p / p.sum() / heads
        uniform[b, seen] += 1 / len(seen) / heads
    return received / uniform


@pytest.mark.parametrize("segmented", [False, True])
def test_received_attention_equals_plain_numpy_across_chunk_borders(monkeypatch, segmented):
    monkeypatch.setattr("modjax.kernels.attention.MIN_QUERY_CHUNK", 3)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 4, 11, 6)).astype(np.float32)
    k = rng.normal(size=(2, 2, 11, 6)).astype(np.float32)
    segments = rng.integers(0, 2, (2, 11)).cumsum(axis=1) // 2 if segmented else None
    side = Side(jnp.arange(11)[None], segments)
    run = jax.jit(lambda q, k: received_attention(q, k, Causal(), side), compiler_options=QUICK)
    assert_close(run(q, k), plain_received(q, k, segments))


def test_attention_routing_has_no_parameters_and_adds_the_whole_update():
    received = RNG.random((BATCH, LENGTH)).astype(np.float32)
    block, y, record = run_block("received", handed={"received": received}, valid_BL=VALID)
    assert not jax.tree.leaves(nnx.state(block.router))
    selected = best_k(received, VALID)
    np.testing.assert_array_equal(record.selected_BL, selected)
    assert_close(y, plain_block(block, np.ones_like(received), selected))


@pytest.mark.parametrize("routing", ["trained", "predictor"])
def test_attention_blocks_rank_by_the_dense_block_before_them_of_their_own_repetition(routing):
    routed = scheme("received", capacity=0.25, causal=Predictor())
    config = ModelSpec(20, 8, 4, 2, 2, 16, layers=(RECEIVED, routed))
    graphdef, params = random_model(config, std=0.8)
    tokens = np.random.default_rng(2).integers(0, 20, (2, LENGTH))

    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        _, records = model(tokens, routing=routing)
        # The first repetition by hand.
        dense, first = nnx.split(model.stack.blocks["0_seq"])
        block = nnx.merge(dense, jax.tree.map(lambda leaf: leaf[0], first))
        attention = block.parts["0_attention"]
        positions = jnp.arange(LENGTH)[None]
        ropes = {10_000.0: rotary_tables(positions, 4, 10_000.0, jnp.float32)}
        at = At(positions, None, None, ropes, {})
        y_BLD = attention.norm(model.embed.table[...][tokens])
        found = records["1_mod"], records["1_mod/causal"].logits_BL
        return *found, attention.queries(y_BLD, at), attention.keys(y_BLD, at)[0]

    record, odds, q, k = jax.jit(run, compiler_options=QUICK)(params, tokens)
    expected = best_k(plain_received(np.asarray(q), np.asarray(k), None), np.ones((2, 16), bool))
    np.testing.assert_array_equal(record.target_BL[0], expected)
    assert np.any(np.asarray(record.target_BL[1]) != expected)
    chosen = record.target_BL if routing == "trained" else np.asarray(odds) > 0
    np.testing.assert_array_equal(record.selected_BL, chosen)


# Learning to select without the future.


def plain_cross_entropy(logits, target, valid):
    p = sigmoid(logits)
    return masked_mean(-np.where(target, np.log(p), np.log(1 - p)), valid)


def test_both_losses_equal_numpy_with_targets_for_every_row():
    # Faults: auxiliary targets written without the batch offset label row 0 only.
    config = dataclasses.replace(CONFIG, rule=TopK(auxiliary=0.3))
    block, _, record = run_block("expert_choice", config=config, valid_BL=VALID)
    scores = X @ np.asarray(block.router.w[..., 0])
    target = best_k(scores, VALID)
    np.testing.assert_array_equal(record.target_BL, target)
    assert target.sum(axis=1).tolist() == [4, 3, 1]
    predictor = block.causal
    normal = X / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + 1e-6)
    hidden = normal @ np.asarray(predictor.w_in[...])
    logits = (hidden * sigmoid(hidden)) @ np.asarray(predictor.w_out[...]) + scores
    taught, own = record.own["causal"], record.own["rule"].losses
    assert_close(taught.logits_BL, logits)
    assert_close(taught.losses["predictor"], 2.0 * plain_cross_entropy(logits, target, VALID))
    assert_close(own["auxiliary"], 0.3 * plain_cross_entropy(scores, target, VALID))


def gradients_of_losses(**weights):
    """Per parameter, the largest gradient of the routers' own losses."""
    layers = (Dense(), MoD(Dense(), capacity=0.25, **weights))
    config = ModelSpec(20, 8, 4, 2, 2, 16, layers=layers)
    graphdef, params = build(config)
    tokens = np.random.default_rng(2).integers(0, 20, (2, LENGTH))

    def own_losses(params):
        return losses(nnx.merge(graphdef, params)(tokens)[1], TokenLoss(jnp.zeros(tokens.shape)))

    grads = nnx.to_pure_dict(jax.jit(jax.grad(own_losses), compiler_options=QUICK)(params))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }


def test_the_loss_of_a_predictor_has_no_gradient_outside_of_it():
    found = gradients_of_losses(causal=Predictor())
    inside = {name for name in found if "/causal/" in name}
    assert len(inside) == 3 and all(found[name] > 0 for name in inside)
    assert {found[name] for name in found.keys() - inside} == {0.0}


def test_the_auxiliary_loss_teaches_the_router_and_never_the_threshold():
    found = gradients_of_losses(rule=TopK(auxiliary=1.0))
    assert found["stack/blocks/1_mod/router/w"] > 0
    assert found["stack/blocks/1_mod/rule/threshold"] == 0


# Causal routing is exact: no wanted token is dropped, up to a bound.


def with_wanted(wanted):
    """Activations whose first number is what the predictor goes by."""
    return np.concatenate([np.where(wanted, 1, -1)[..., None], X[..., 1:]], axis=-1).astype("f4")


def go_by_the_first_number(block):
    block.router.w[...] = jnp.zeros((WIDTH, 1)).at[0].set(0.7)
    block.causal.w_out[...] = jnp.zeros_like(block.causal.w_out[...])


@pytest.mark.parametrize("slots", [None, 5])
def test_every_wanted_position_is_processed_or_counted_whatever_their_number(slots):
    rng = np.random.default_rng(5)
    rngs = nnx.Rngs(0)
    block = MoDBlock(Mixer(rngs), WIDTH, CONFIG, rngs=rngs)
    go_by_the_first_number(block)
    graphdef, params = nnx.split(block)
    call = jax.jit(
        lambda params, x: nnx.merge(graphdef, params)(
            x, valid_BL=VALID, routing="predictor", slots=slots
        ),
        compiler_options=QUICK,
    )
    # The k is 4: none, fewer, as many, a few more, many more, and all.
    for count in (0, 1, 4, 6, 7, 12, 13, 16):
        wanted = np.zeros((BATCH, LENGTH), bool)
        for b, some in enumerate((count, count // 2, LENGTH)):
            wanted[b, rng.permutation(LENGTH)[:some]] = True
        x = with_wanted(wanted)
        y, record = jax.device_get(call(params, x))
        wanted &= VALID
        selected = first_k(wanted, slots or LENGTH)
        np.testing.assert_array_equal(record.wanted_BL, wanted)
        np.testing.assert_array_equal(record.selected_BL, selected)
        assert_close(y, plain_block(block, 0.7 * x[..., 0], selected, x))
        untouched = ~selected
        assert y[untouched].tobytes() == x[untouched].tobytes()
