"""Draws of tokens follow the distribution of exactly the tokens that a Sampling keeps.

Legend: B batch, V vocabulary.
"""

import jax
import numpy as np
import pytest

from modjax.decoding.sampling import Sampling, draw_tokens
from modjax.errors import InputError
from tests.nn.small import QUICK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be 0 or more"),
        ({"temperature": float("nan")}, "temperature = nan: must be 0 or more"),
        ({"temperature": float("inf")}, "temperature = inf: must be 0 or more"),
        ({"top_k": -1}, "top_k = -1: must be 0"),
        ({"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p = 1.5: must be in \(0, 1\]"),
    ],
)
def test_sampling_refuses_what_means_nothing(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


# Descending but for ties: at ids 1 and 2, 5 and 6, 9 and 10.
LOGITS_V = np.log([0.2, 0.15, 0.15, 0.12, 0.1, 0.07, 0.07, 0.05, 0.04, 0.02, 0.02, 0.01])
LOGITS_V = LOGITS_V[[7, 0, 9, 3, 1, 11, 5, 2, 8, 4, 10, 6]].astype(np.float32)
DRAWS = 20_000


def draws(logits_V, sampling, seed=0):
    """Returns many independent draws, one per row."""
    logits_BV = np.broadcast_to(np.float32(logits_V), (DRAWS, len(logits_V)))
    return np.asarray(_draw(logits_BV, jax.random.key(seed), sampling))


_draw = jax.jit(draw_tokens, static_argnames="sampling", compiler_options=QUICK)


def reference(logits_V, temperature, top_k, top_p):
    """Returns probabilities in float64, token by token. Ties with the last kept one are kept."""
    p_V = np.exp(np.float64(logits_V) / temperature)
    order = np.argsort(-p_V, kind="stable")
    if top_k:
        p_V = np.where(p_V >= p_V[order[min(top_k, len(p_V)) - 1]], p_V, 0)
    p_V /= p_V.sum()
    mass = 0.0
    for v in order:
        if mass >= top_p:
            break
        mass, least = mass + p_V[v], p_V[v]
    p_V = np.where(p_V >= least, p_V, 0)
    return p_V / p_V.sum()


def test_temperature_0_takes_the_likeliest_whatever_else_is_asked():
    logits_BV = np.random.default_rng(0).normal(0, 1, (50, 12)).astype(np.float32)
    for options in ({}, {"top_k": 3, "top_p": 0.1}):
        tokens_B = draw_tokens(logits_BV, jax.random.key(0), Sampling(temperature=0, **options))
        np.testing.assert_array_equal(tokens_B, np.argmax(logits_BV, axis=1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (1.0, 1, 1.0),
        (1.0, 2, 1.0),
        (1.0, 4, 1.0),
        (1.0, 50, 1.0),
        (1.0, 0, 1e-6),
        (1.0, 0, 0.3),
        (1.0, 0, 0.6),
        (1.3, 0, 0.9),
        (1.0, 6, 0.8),
    ],
)
def test_draws_follow_the_numpy_softmax_of_exactly_the_kept_tokens(temperature, top_k, top_p):
    p_V = reference(LOGITS_V, temperature, top_k, top_p)
    count_V = np.bincount(draws(LOGITS_V, Sampling(temperature, top_k, top_p)), minlength=12)
    np.testing.assert_array_equal(count_V > 0, p_V > 0)
    # Five standard errors of a binomial count.
    assert np.all(np.abs(count_V - DRAWS * p_V) <= 5 * np.sqrt(DRAWS * p_V * (1 - p_V)))


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9}])
def test_ids_beyond_the_vocabulary_are_never_drawn(options):
    logits_V = np.concatenate([LOGITS_V, np.full(4, 9, np.float32)])  # the likeliest by far
    drawn_ids = set(draws(logits_V, Sampling(**options, vocab_size=12)))
    assert drawn_ids and max(drawn_ids) < 12
    if "top_k" in options:
        assert len(drawn_ids) == 5, "ids that cannot be drawn do not count among the k"


def test_even_a_minute_temperature_draws_the_likeliest():
    # Logits divided by it overflow.
    for temperature, options in (
        (1e-37, {}),
        (1e-37, {"top_p": 0.9}),
        (1e-37, {"vocab_size": 11}),
        (1e-50, {"top_k": 3}),
    ):
        sampling = Sampling(temperature=temperature, **options)
        tokens_B = draws(50 * LOGITS_V, sampling)
        np.testing.assert_array_equal(tokens_B, np.argmax(LOGITS_V))


def test_a_rows_draw_depends_on_its_own_logits_only():
    rng = np.random.default_rng(1)
    logits_BV, others_BV = rng.normal(0, 1, (2, DRAWS, 12)).astype(np.float32)
    others_BV[::2] = logits_BV[::2]
    key = jax.random.key(5)
    mine_B, theirs_B = (np.asarray(_draw(x, key, Sampling())) for x in (logits_BV, others_BV))
    np.testing.assert_array_equal(mine_B[::2], theirs_B[::2])
    assert np.any(mine_B[1::2] != theirs_B[1::2])
    assert np.any(mine_B != np.asarray(_draw(logits_BV, jax.random.key(6), Sampling())))
