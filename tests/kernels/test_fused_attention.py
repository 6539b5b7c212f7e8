"""The fused kernels of accelerators against the plain form, in values and gradients.

Legend: B batch, L positions, N heads, G kv heads, H head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import Scoring, Side, cudnn, plain, splash
from modjax.specs import Bidirectional, Blocks, Causal, Execution, Window
from modjax.training.mesh import make_mesh

B, N, G, H = 2, 4, 2, 128
SEGMENTS = np.repeat([[1, 2, 3], [1, 4, 5]], [60, 100, 40], axis=1).astype(np.int32)


def tensors(length):
    rng = np.random.default_rng(0)
    shapes = (B, N, length, H), (B, G, length, H), (B, G, length, H), (B, N, length, H)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def both(length, scoring, layout, segments=None, valid=None, ignored=None):
    """Returns values and gradients of the kernel and of the plain form.

    ignored: queries (B, L) whose outputs do not count.
    """
    *inputs, weights = tensors(length)
    counts = jnp.ones((B, length), bool) if ignored is None else ~jnp.asarray(ignored)
    positions = jnp.arange(length)[None]
    side = Side(positions, segments, valid)
    assert splash.applies(inputs[0], scoring, side, layout)

    def result(attend):
        def total(inputs):
            out = jnp.where(counts[:, None, :, None], attend(*inputs), 0)
            return jnp.sum(out * weights), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
        return out, grads

    run = functools.partial(splash.attend, interpret=True)
    ours = result(lambda *inputs: run(*inputs, scoring, side, layout))
    theirs = result(lambda *inputs: plain.attend(*inputs, scoring, side, None, None))
    return ours, theirs


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(Causal()),
        Scoring(Causal() & Window(50), scale=0.05),
        Scoring(Window(30), softcap=3.0),
        Scoring(Bidirectional()),
        Scoring(Causal() & Blocks(70)),
    ],
    ids=str,
)
def test_splash_equals_the_plain_form_at_a_length_that_is_padded(scoring):
    close(*both(200, scoring, "whole"))


def test_splash_keeps_to_segments():
    close(*both(200, Scoring(Causal()), "whole", SEGMENTS))
    close(*both(200, Scoring(Causal() & Window(50)), "whole", SEGMENTS))


def test_splash_of_a_selection_equals_the_plain_form_for_its_valid_queries():
    valid = np.arange(200)[None] < np.array([[200], [130]])
    close(*both(200, Scoring(Causal()), "part", SEGMENTS, valid, ~valid))


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_splash_hides_keys_between_valid_ones_and_a_query_without_a_key_gets_zero(segments):
    valid = np.random.default_rng(1).random((B, 200)) < 0.4
    valid[:, :7] = False  # their queries see no key
    ours, theirs = both(200, Scoring(Causal()), "masked", segments, valid)
    close(ours, theirs)
    assert not np.any(ours[0][:, :, :7]) and np.all(np.any(ours[0][:, :, 50], axis=-1))


def test_splash_leaves_to_the_plain_form_what_places_do_not_decide():
    q = jnp.zeros((B, N, 256, H))
    side, hidden = (
        Side(jnp.arange(256)[None]),
        Side(jnp.arange(256)[None], None, jnp.ones((B, 256))),
    )
    window = Scoring(Causal() & Window(50))
    assert splash.applies(q, window, side, "whole")
    assert not splash.applies(q, window, side, "part"), "positions may lie further apart"
    assert not splash.applies(q, Scoring(Bidirectional()), hidden, "whole")
    assert not splash.applies(q[:, :, :100], Scoring(Causal()), side, "whole")
    assert not splash.applies(q[..., :64], Scoring(Causal()), side, "whole")


def test_on_a_mesh_each_device_runs_splash_on_its_own_rows_and_heads(monkeypatch):
    *inputs, _ = tensors(200)
    side, scoring = Side(jnp.arange(200)[None], SEGMENTS), Scoring(Causal())
    expected = plain.attend(*inputs, scoring, side, None, None)
    local = []

    def kernel(*args, **kwargs):
        made = original(*args, **kwargs)
        return lambda q, k, v, ids: (local.append((q.shape, k.shape)), made(q, k, v, ids))[1]

    original = splash._kernel
    monkeypatch.setattr(splash, "_kernel", kernel)
    run = functools.partial(splash.attend, interpret=True)
    with jax.set_mesh(make_mesh(Execution(data=1, fsdp=2, tensor=2), jax.devices()[:4])):
        got = jax.jit(lambda *x: run(*x, scoring, side, "whole"))(*inputs)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert {shape for shapes in local for shape in shapes} == {(2, 256, H), (1, 256, H)}


CUDNN = {
    "causal": (Scoring(Causal()), "whole"),
    "causal, selected": (Scoring(Causal(), scale=0.3), "part"),
    "window": (Scoring(Causal() & Window(10)), "whole"),
    "all": (Scoring(Bidirectional()), "whole"),
}


@pytest.mark.parametrize("case", CUDNN)
def test_what_cudnn_is_asked_for_is_the_plain_form(monkeypatch, case):
    """Values and gradients on a GPU; elsewhere, XLA answers what cuDNN is asked for."""
    (scoring, layout), *inputs = CUDNN[case], *tensors(200)
    *inputs, weights = (x[..., :64].astype(jnp.bfloat16) for x in inputs)
    side = Side(jnp.arange(200)[None])
    assert cudnn.applies(inputs[0], scoring, side, layout)
    if jax.default_backend() != "gpu":
        asked = jax.nn.dot_product_attention

        def answered(*args, implementation, **options):
            assert implementation == "cudnn"
            return asked(*args, implementation="xla", **options)

        monkeypatch.setattr(jax.nn, "dot_product_attention", answered)

    def result(function):
        def total(inputs):
            out = function(*inputs)
            return jnp.sum((out * weights).astype(jnp.float32)), out

        (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (out, grads))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours = result(lambda *x: cudnn.attend(*x, scoring, side, layout))
    theirs = result(lambda *x: plain.attend(*x, scoring, side, None, None))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # A window of one position more differs by 0.3 of it.
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_cudnn_is_not_asked_for_what_it_cannot_do():
    q, side = jnp.zeros((B, N, 256, H), jnp.bfloat16), Side(jnp.arange(256)[None])
    causal, window = Scoring(Causal()), Scoring(Causal() & Window(50))
    hidden = side._replace(valid_BL=jnp.ones((B, 256), bool))
    packed = side._replace(segments_BL=jnp.ones((B, 256), jnp.int32))
    assert cudnn.applies(q, causal, hidden, "part"), "entries that are not valid come last"
    assert not cudnn.applies(q, causal, hidden, "masked")
    assert not cudnn.applies(q, causal, packed, "whole")
    assert not cudnn.applies(q, window, side, "part")
    assert not cudnn.applies(q, Scoring(Causal(), softcap=3.0), side, "whole")
    assert not cudnn.applies(q, Scoring(Causal() & Blocks(8)), side, "whole")
    assert not cudnn.applies(q.astype(jnp.float32), causal, side, "whole")
    assert not cudnn.applies(q[..., :100], causal, side, "whole")
