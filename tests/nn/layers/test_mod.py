"""Mixture-of-Depths against a plain loop, its properties, and the faults seen in public code.

The faults are those of implementations surveyed before this one was written: each test below
fails for at least one of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax import nn
from modjax.nn import At, Call, MoDBlock
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import (
    MLP,
    Attention,
    Dense,
    MoD,
    MoDConfig,
    ModelSpec,
    Predictor,
    Random,
    Rope,
    Seq,
    TopK,
)
from tests.nn.small import QUICK, WIDTH, Mixer, build, mod_block, stream

LENGTH, ROPE = 16, Rope(100.0)


SMALL = {"batch": 2, "length": 10}


def plain_mod(w, router, x, ranking, capacity, weight, residual):
    """Returns the block's output token by token, in jax so that it can be differentiated."""
    weigh = {
        "linear": lambda r: r,
        "sigmoid": lambda r: 1 / (1 + jnp.exp(-r)),
        "two_sigmoid": lambda r: 2 / (1 + jnp.exp(-r)),
        "one_plus_tanh": lambda r: 1 + jnp.tanh(r),
    }[weight]
    rows = []
    for sequence, best_first in zip(x, ranking, strict=True):
        scores = [sequence[i] @ router for i in range(len(sequence))]
        k = max(1, round(capacity * len(scores)))
        out, total = [sequence[i] for i in range(len(scores))], jnp.zeros(WIDTH)
        for rank, i in enumerate(sorted(best_first[:k].tolist())):
            total = total + sequence[i]
            f = sequence[i] + jnp.tanh(total / (rank + 1)) @ w
            r, x_i = weigh(scores[i]), sequence[i]
            out[i] = {"delta": x_i + r * (f - x_i), "literal": x_i + r * f}[residual]
        rows.append(jnp.stack(out))
    return jnp.stack(rows)


@pytest.mark.parametrize(
    "weight, residual",
    [
        ("linear", "delta"),
        ("linear", "literal"),
        ("sigmoid", "delta"),
        ("two_sigmoid", "delta"),
        ("one_plus_tanh", "literal"),
    ],
)
def test_block_equals_a_plain_loop_in_values_and_gradients(weight, residual):
    block = mod_block(capacity=0.3, rule=TopK(weight), residual=residual)
    x = stream(**SMALL)
    ranking = np.argsort(-(np.asarray(x) @ np.asarray(block.router.w[..., 0])), axis=1)
    graphdef, params = nnx.split(block)

    def ours(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

    def plain(w, router, x):
        out = plain_mod(w, router, x, ranking, 0.3, weight, residual)
        return jnp.sum(jnp.sin(out)), out

    arrays = (block.inner.w[...], block.router.w[..., 0], x)
    grads, expected = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(block(x)[0], expected, rtol=1e-5, atol=1e-6)
    grad_params, grad_x = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    np.testing.assert_allclose(grad_params["inner"]["w"][...], grads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_params["router"]["w"][..., 0], grads[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_x, grads[2], rtol=1e-4, atol=1e-5)


# Properties that need no reference implementation.


class Constant(MoDBlock):
    """Block whose router gives every token weight 1 under any reading."""

    def __call__(self, x_BLD, *per_position, **kwargs):
        self.router.w[...] = jnp.zeros((x_BLD.shape[-1], 1)).at[0].set(1.0)
        return super().__call__(x_BLD.at[..., 0].set(1.0), *per_position, **kwargs)


def test_capacity_one_and_weight_one_is_the_dense_block():
    rngs = nnx.Rngs(0)
    inner = Mixer(rngs)
    config = MoDConfig(capacity=1.0)
    block = Constant(inner, WIDTH, config, rngs=rngs)
    x = stream().at[..., 0].set(1.0)
    # A residual counted twice, or rescaled by the weight, would differ by a multiple of x.
    np.testing.assert_allclose(block(x)[0], inner(x), rtol=1e-6, atol=1e-6)


def test_a_block_without_an_update_is_the_identity_bit_for_bit():
    block = mod_block(capacity=0.5)
    block.inner.w[...] = jnp.zeros((WIDTH, WIDTH))
    x = stream()
    assert np.asarray(block(x)[0]).tobytes() == np.asarray(x).tobytes()


def test_a_router_that_says_zero_leaves_the_stream_alone():
    # Faults: output w * block(x), which rescales the residual.
    block = mod_block(capacity=0.5)
    block.router.w[...] = jnp.zeros((WIDTH, 1))
    x = stream()
    np.testing.assert_array_equal(block(x)[0], x)


def test_unselected_positions_keep_their_bits_and_selected_ones_change():
    x = stream()
    y, record = mod_block(capacity=0.25)(x)
    selected = np.asarray(record.selected_BL)
    same = np.all(np.asarray(x) == np.asarray(y), axis=-1)
    np.testing.assert_array_equal(same, ~selected)


def test_each_row_selects_exactly_k_also_when_scores_tie():
    # Faults: a strict comparison with the k-th score takes k - 1, "at least" takes more on ties;
    # indices without the batch offset mark row 0 only.
    block = mod_block(capacity=0.25)
    x = jnp.tile(stream(length=2), (1, LENGTH // 2, 1))
    np.testing.assert_array_equal(block(x)[1].selected_BL.sum(axis=1), [4, 4, 4])


def test_short_sequences_still_select_one_position():
    x = stream(length=2)
    np.testing.assert_array_equal(mod_block(capacity=0.125)(x)[1].selected_BL.sum(axis=1), 1)


def test_weight_of_a_token_does_not_depend_on_the_other_tokens():
    # Faults: a softmax over the selected tokens, which is not causal and sums to 1. The inner
    # block's update of the first position depends on that position alone.
    block = mod_block(capacity=1.0)
    x = stream()
    changed = x.at[:, -1].multiply(7.0)
    np.testing.assert_allclose(block(x)[0][:, 0], block(changed)[0][:, 0], rtol=1e-6)


def test_the_router_has_a_gradient_from_every_row():
    block = mod_block(capacity=0.25)
    graphdef, params = nnx.split(block)
    for row in range(3):

        def loss(params, row=row):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(stream())[0][row]))

        assert float(jnp.abs(jax.grad(loss)(params)["router"]["w"][...]).min()) > 0


def test_the_router_computes_in_float32_under_bfloat16():
    block = mod_block(capacity=0.25)
    x = stream().astype(jnp.bfloat16)
    y, record = block(x)
    assert y.dtype == jnp.bfloat16 and record.scores_BL.dtype == jnp.float32
    exact = np.asarray(x.astype(jnp.float32)) @ np.asarray(block.router.w[..., 0])
    np.testing.assert_allclose(record.scores_BL, exact, rtol=1e-5, atol=1e-5)


class WithTables(nnx.Module):
    """Layer of modjax as a block that takes rotary tables and segment ids beside x."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x_BLD, rope_BLH, segments_BL):
        at = At(jnp.arange(x_BLD.shape[1])[None], segments_BL, None, {str(ROPE): rope_BLH}, {})
        return self.layer(x_BLD, at, Call()).x


@pytest.mark.parametrize("as_layer", [True, False])
def test_selected_tokens_keep_their_original_rotary_positions_and_segments(as_layer):
    # Faults: positions compacted to 0..k-1; segment ids not gathered.
    shape, dense = ModelSpec(32, 16, 1, 2, 1, 32).shape, Seq(Attention(rope=ROPE), MLP())
    rngs = nnx.Rngs(1)
    if as_layer:
        block = nn.build(MoD(dense, capacity=0.4), shape, rngs=rngs)
        inner = WithTables(block.inner)
    else:
        inner = WithTables(nn.build(dense, shape, rngs=rngs))
        block = MoDBlock(inner, 16, MoDConfig(capacity=0.4), rngs=rngs)

    def route(x, rope, segments):
        if not as_layer:
            return block(x, rope, segments)
        at = At(jnp.arange(20)[None], segments, None, {str(ROPE): rope}, {})
        out = block(x, at, Call())
        return out.x, out.records[""]

    x = stream(width=16, length=20)
    segments = jnp.repeat(jnp.array([[1, 2], [1, 1], [1, 2]]), 10, axis=1)
    rope = rotary_tables(jnp.arange(20)[None], ROPE, 8, 20, jnp.float32)
    y, record = jax.jit(route, compiler_options=QUICK)(x, rope, segments)
    run = jax.jit(inner, compiler_options=QUICK)
    for b in range(3):
        chosen = np.flatnonzero(record.selected_BL[b])
        rope_chosen = rotary_tables(jnp.asarray(chosen)[None], ROPE, 8, 20, jnp.float32)
        f = run(x[b : b + 1, chosen], rope_chosen, segments[b : b + 1, chosen])[0]
        r = np.asarray(x[b, chosen] @ block.router.w[..., 0])[:, None]
        expected = np.asarray(x[b, chosen]) + r * np.asarray(f - x[b, chosen])
        np.testing.assert_allclose(y[b, chosen], expected, rtol=1e-4, atol=1e-5)


def test_padding_is_never_selected_and_is_left_as_it_was():
    block = mod_block(capacity=0.5)
    x = stream()
    valid = jnp.arange(LENGTH)[None] < jnp.array([[3], [LENGTH], [0]])
    # Padding scores highest of all.
    x = jnp.where(valid[..., None], x, 100 * jnp.sign(block.router.w[..., 0])[None, None])
    y, record = block(x, valid_BL=valid)
    # Half of what is there, as Python rounds it: 1.5 to 2.
    np.testing.assert_array_equal(record.selected_BL.sum(axis=1), [2, 8, 0])
    assert not np.any(np.asarray(record.selected_BL) & ~np.asarray(valid))
    padding = ~np.asarray(valid)
    np.testing.assert_array_equal(np.asarray(y)[padding], np.asarray(x)[padding])
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize(
    "routing, reaches_back",
    [("trained", True), ("causal", False), ("threshold", False), ("predictor", False)],
)
def test_editing_a_token_reaches_back_as_trained_only(routing, reaches_back):
    block = mod_block(capacity=0.25, causal=Predictor())
    block.rule.threshold[...] = jnp.array(
        [1e-6]
    )  # of exactly 0, never measured, there is a warning
    x = stream(seed=3, batch=1)
    favourite = 5.0 * jnp.sign(block.router.w[..., 0])
    # Row 0 is left alone; row i has another token at edits[i - 1].
    edits = [1, LENGTH // 2, LENGTH - 1]
    rows = jnp.concatenate([x, *(x.at[:, t].set(favourite[None]) for t in edits)])
    y = np.asarray(jax.jit(lambda x: block(x, routing=routing)[0], compiler_options=QUICK)(rows))
    changed = [bool(np.any(y[0, :t] != y[i + 1, :t])) for i, t in enumerate(edits)]
    assert changed[-1] == reaches_back and any(changed) == reaches_back
    assert all(np.any(y[0, t:] != y[i + 1, t:]) for i, t in enumerate(edits))


CONFIG = ModelSpec(40, 16, 4, 2, 2, 32)


def test_every_routed_layer_has_a_router_of_its_own():
    # Faults: one router shared by all layers.
    config = dataclasses.replace(CONFIG, layers=(MoD(Dense()),))
    params = nnx.to_pure_dict(build(config)[1])
    routers = np.asarray(params["stack"]["blocks"]["0_mod"]["router"]["w"])
    assert routers.shape == (4, 16, 1)
    assert len(np.unique(routers.round(6), axis=0)) == 4


def test_stochastic_control_draws_other_positions_for_another_key_and_layer():
    config = dataclasses.replace(CONFIG, layers=(Dense(), MoD(Dense(), rule=Random())))
    tokens = jnp.ones((2, 32), jnp.int32)
    graphdef, params = build(config)

    def run(key):
        return nnx.merge(graphdef, params)(tokens, key=key)[1]

    route = jax.jit(run, compiler_options=QUICK)
    first, again, other = (
        np.asarray(route(jax.random.key(s))["1_mod"].selected_BL) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first[0] != first[1])
    with pytest.raises(ValueError, match="key"):
        jax.eval_shape(run, None)
