"""Attention and rotary positions against plain numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import Mask, attend, attention
from modjax.nn.layers import rotary_tables, rotate


def plain_attention(q, k, v, segments):
    """One query at a time: softmax over earlier positions of its own segment."""
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
    monkeypatch.setattr(attention, "MIN_QUERY_CHUNK", 3)
    q, k, v = inputs(length)
    segments = np.random.default_rng(0).integers(1, 3, (2, length)).cumsum(1) // 4
    segments = segments if segmented else None
    got = attend(q, k, v, Mask(None if segments is None else jnp.asarray(segments)))
    expected = plain_attention(*(np.asarray(t, np.float64) for t in (q, k, v)), segments)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_gradients_equal_those_of_another_implementation(monkeypatch):
    monkeypatch.setattr(attention, "MIN_QUERY_CHUNK", 3)
    q, k, v = inputs(19)

    def other(q, k, v):
        swap = [t.transpose(0, 2, 1, 3) for t in (q, k, v)]
        return jax.nn.dot_product_attention(*swap, is_causal=True).transpose(0, 2, 1, 3)

    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v)
        for f in (lambda *a: attend(*a, Mask()), other)
    )
    for one, another in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-5)


def test_scores_and_softmax_are_float32_where_bfloat16_would_be_far_off():
    # At scores of about 50, neighbours in bfloat16 are 0.25 apart: a quarter of a weight.
    q, k, v = (t.astype(jnp.bfloat16) for t in inputs(32, width=16))
    q = q * 20
    got = attend(q, k, v, Mask())
    assert got.dtype == jnp.bfloat16
    expected = plain_attention(*(np.asarray(t, np.float64) for t in (q, k, v)), None)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0.01, atol=0.04)


def test_rotary_equals_complex_multiplication_at_the_given_positions():
    positions = np.array([[0, 3, 11]])
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    tables = rotary_tables(jnp.asarray(positions), 8, 100.0, jnp.float32)
    got = np.asarray(rotate(jnp.asarray(x), tables))
    frequency = 100.0 ** -(np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[0][:, None] * frequency)
    np.testing.assert_allclose(got[..., :4] + 1j * got[..., 4:], turned, rtol=1e-5, atol=1e-5)
