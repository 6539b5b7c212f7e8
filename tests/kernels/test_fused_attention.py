"""The fused kernels of accelerators against the plain form, in values and gradients.

Legend: B batch, L positions, N heads, G kv heads, H head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.kernels import Scoring, Side, plain, splash
from modjax.specs import Bidirectional, Blocks, Causal, Window

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
