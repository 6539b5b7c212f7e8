"""Attention and rotary positions against plain numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.kernels import Scoring, Side, attend
from modjax.nn import At, Call, build
from modjax.nn.layers.attention import rotary_tables, rotate, side
from modjax.specs import Attention, Bidirectional, Causal, Rope, Shape, Window


def plain_attention(q, k, v, segments):
    """Returns attention, one query at a time: a softmax over earlier positions of its segment."""
    batch, heads, length, width = q.shape
    out = np.zeros(q.shape)
    for b, n, i in np.ndindex(batch, heads, length):
        g = n * k.shape[1] // heads
        seen = [j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]]
        scores = np.array([q[b, n, i] @ k[b, g, j] for j in seen]) / np.sqrt(width)
        p = np.exp(scores - scores.max())
        out[b, n, i] = (p / p.sum()) @ v[b, g, seen]
    return out


def inputs(length, heads=4, kv_heads=2, width=6):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(2, heads, length, width))
    k, v = rng.normal(size=(2, 2, kv_heads, length, width))
    return tuple(jnp.asarray(t, jnp.float32) for t in (q, k, v))


@pytest.mark.parametrize("length", [1, 5, 8, 19])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_equals_plain_numpy_across_chunk_borders(monkeypatch, length, segmented):
    monkeypatch.setattr("modjax.kernels.plain.MIN_QUERY_CHUNK", 3)
    q, k, v = inputs(length)
    segments = np.random.default_rng(0).integers(1, 3, (2, length)).cumsum(1) // 4
    segments = segments if segmented else None
    got = attend(q, k, v, Scoring(Causal()), Side(jnp.arange(length)[None], segments))
    expected = plain_attention(*(np.asarray(t, np.float64) for t in (q, k, v)), segments)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_gradients_equal_those_of_another_implementation(monkeypatch):
    monkeypatch.setattr("modjax.kernels.plain.MIN_QUERY_CHUNK", 3)
    q, k, v = inputs(19)

    def other(q, k, v):
        swap = [t.transpose(0, 2, 1, 3) for t in (q, k, v)]
        return jax.nn.dot_product_attention(*swap, is_causal=True).transpose(0, 2, 1, 3)

    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v)
        for f in (lambda *a: attend(*a, Scoring(Causal()), Side(jnp.arange(19)[None])), other)
    )
    for one, another in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-5)


def test_scores_and_softmax_are_float32_where_bfloat16_would_be_far_off():
    # At scores of about 50, neighbours in bfloat16 are 0.25 apart: a quarter of a weight.
    q, k, v = (t.astype(jnp.bfloat16) for t in inputs(32, width=16))
    q = q * 20
    got = attend(q, k, v, Scoring(Causal()), Side(jnp.arange(32)[None]))
    assert got.dtype == jnp.bfloat16
    expected = plain_attention(*(np.asarray(t, np.float64) for t in (q, k, v)), None)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0.01, atol=0.04)


def test_rotary_equals_complex_multiplication_at_the_given_positions():
    positions = np.array([[0, 3, 11]])
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    tables = rotary_tables(jnp.asarray(positions), Rope(100.0), 8, 8, jnp.float32)
    got = np.asarray(rotate(jnp.asarray(x), tables))
    frequency = 100.0 ** -(np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[0][:, None] * frequency)
    np.testing.assert_allclose(got[..., :4] + 1j * got[..., 4:], turned, rtol=1e-5, atol=1e-5)


SHAPE = Shape(12, 2, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=8, norm_eps=1e-6)


def layer_and_at(mask, positions, valid=None):
    layer = build(Attention(mask=mask), SHAPE, rngs=nnx.Rngs(0))
    return layer, at_of(positions, valid)


def at_of(positions, valid=None):
    positions = jnp.asarray(positions)[None]
    return At(
        positions, None, valid, {"Rope()": rotary_tables(positions, Rope(), 6, 8, jnp.float32)}, {}
    )


def test_keys_of_all_positions_serve_the_queries_of_some():
    layer, at = layer_and_at(Causal() & Window(5), range(12))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12)), jnp.float32)
    whole = layer(x, at, Call()).x - x
    y, some = layer.before(x), np.array([2, 7, 8, 11])
    queries = layer.queries(y[:, some], at_of(some))
    got = layer.attend(queries, at_of(some), *layer.keys(y, at), side(at))
    np.testing.assert_allclose(got, whole[:, some], rtol=1e-5, atol=1e-6)


def test_queries_may_see_a_memory_whose_padding_is_hidden():
    valid = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
    layer, memory_at = layer_and_at(Bidirectional(), range(5), jnp.asarray(valid))
    rng = np.random.default_rng(0)
    x, memory = (jnp.asarray(rng.normal(size=(2, n, 12)), jnp.float32) for n in (3, 5))
    at = at_of([7, 8, 9])
    got = layer.attend(layer.queries(x, at), at, *layer.keys(memory, memory_at), side(memory_at))

    w = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("w_q", "w_k", "w_v")}
    turns = {n: np.exp(1j * np.outer(n, 1e4 ** -(np.arange(3) / 3))) for n in ((7, 8, 9), range(5))}

    def heads(source, name, positions=None):
        z = np.einsum("bld,dnh->bnlh", np.asarray(source, np.float64), w[name])
        if positions is None:
            return z
        turned = (z[..., :3] + 1j * z[..., 3:]) * turns[positions]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k, v = heads(x, "w_q", (7, 8, 9)), heads(memory, "w_k", range(5)), heads(memory, "w_v")
    expected = np.zeros((2, 3, 12))
    for b, n, i in np.ndindex(2, 4, 3):
        scores = k[b, n // 2, valid[b]] @ q[b, n, i] / np.sqrt(6)
        p = np.exp(scores - scores.max())
        z = p / p.sum() @ v[b, n // 2, valid[b]]
        expected[b, i] += z @ np.asarray(layer.w_out[...], np.float64)[n]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
