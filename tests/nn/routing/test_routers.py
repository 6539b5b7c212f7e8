"""Routers against plain numpy: scores by position, and scores by the attention received.

Legend: B batch, L positions, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.kernels import Scoring, Side, received_attention
from modjax.nn import At
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import Causal, ModelSpec, Predictor, Rope
from tests.nn.routing.plain import (
    BATCH,
    LENGTH,
    RNG,
    VALID,
    X,
    assert_close,
    best_k,
    plain_block,
    run_block,
)
from tests.nn.small import QUICK, RECEIVED, WIDTH, random_model, scheme


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


def plain_received(q, k, segments):
    """Returns attention received, averaged over heads, as a multiple of uniform attention."""
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
    monkeypatch.setattr("modjax.kernels.plain.MIN_QUERY_CHUNK", 3)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 4, 11, 6)).astype(np.float32)
    k = rng.normal(size=(2, 2, 11, 6)).astype(np.float32)
    segments = rng.integers(0, 2, (2, 11)).cumsum(axis=1) // 2 if segmented else None
    side = Side(jnp.arange(11)[None], segments)
    received = functools.partial(received_attention, scoring=Scoring(Causal()), positions=side)
    run = jax.jit(received, compiler_options=QUICK)
    assert_close(run(q, k), plain_received(q, k, segments))


def test_attention_routing_has_no_parameters_and_adds_the_whole_update():
    received = RNG.random((BATCH, LENGTH)).astype(np.float32)
    block, y, record = run_block("received", passed={"received": received}, valid_BL=VALID)
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
        ropes = {"Rope()": rotary_tables(positions, Rope(), 4, 8, jnp.float32)}
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
