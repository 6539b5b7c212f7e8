"""Editing a token never changes what comes before it, wherever the routing is causal.

Legend: L positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.spec import MoDConfig, ModelSpec
from tests.nn.small import KINDS, QUICK, random_model

LENGTH = 10


def config_of(pattern):
    # One compiled size: rounding, too, is the same for any number of selected positions.
    mod = MoDConfig(capacity=0.7, predictor_weight=1.0, auxiliary_weight=1.0)
    return ModelSpec(20, 8, len(pattern), 2, 1, 16, pattern=pattern, mod=mod)


def reach(run):
    """How far edits reach: {t: first position whose output ever changed}; run(tokens_1L)."""
    first = {}
    for seed in range(16):
        tokens = np.random.default_rng(seed).integers(0, 20, (1, LENGTH))
        before = np.asarray(run(tokens))[0]
        for t in range(1, LENGTH):
            edited = tokens.copy()
            edited[:, t] = (tokens[:, t] + 7) % 20
            changed = np.any(before != np.asarray(run(edited))[0], axis=-1)
            first[t] = min(first.get(t, t), int(np.flatnonzero(changed)[0]))
    return first


@pytest.mark.parametrize("routing", KINDS)
def test_an_edit_changes_nothing_before_it_in_the_call_and_in_prefill(routing):
    graphdef, params = random_model(config_of(KINDS[routing]), std=0.5, seed=8)
    key = jax.random.key(0)

    def run(params, tokens, length):
        model = nnx.merge(graphdef, params)
        called = model(tokens, key=key, routing=routing)[0]
        return called, model.prefill(tokens, length, max_length=LENGTH, routing=routing, key=key)

    compiled = jax.jit(run, compiler_options=QUICK)
    assert reach(lambda tokens: compiled(params, tokens, jnp.array([LENGTH]))[0]) == {
        t: t for t in range(1, LENGTH)
    }

    def prefill(tokens, t):
        """What a prompt of t tokens leaves behind, whatever follows them."""
        logits, cache, depths = compiled(params, tokens, jnp.array([t]))[1]
        kept = [
            leaf[:, :, : int(layer.length_B[0])] for layer in cache.layers for leaf in layer[:2]
        ]
        return jax.tree.leaves((logits, kept, cache.positions_B, depths))

    tokens = np.random.default_rng(0).integers(0, 20, (1, LENGTH))
    for t in (1, 4, LENGTH - 1):
        edited = tokens.copy()
        edited[:, t:] = (tokens[:, t:] + 7) % 20
        for ours, theirs in zip(prefill(tokens, t), prefill(edited, t), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "pattern, looks_ahead",
    [
        (("mod",), True),
        (("dense", "attention"), True),
        (("dense", "stochastic", "positional", "learned_position", "token_choice", "threshold"),
         False),
    ],
)  # fmt: skip
def test_the_selection_of_training_looks_ahead_where_positions_compete_by_content(
    pattern, looks_ahead
):
    graphdef, params = random_model(config_of(pattern), std=0.5, seed=8)
    run = jax.jit(
        lambda params, tokens: nnx.merge(graphdef, params)(tokens, key=jax.random.key(0))[0],
        compiler_options=QUICK,
    )
    reached = reach(lambda tokens: run(params, tokens))
    assert (reached != {t: t for t in range(1, LENGTH)}) == looks_ahead
    assert all(first <= t for t, first in reached.items())


@pytest.mark.parametrize(
    "pattern, routing, message",
    [
        (("dense", "attention"), "threshold", "attention blocks of this model can select by top_k"),
        (("dense", "mod"), "router", "mod blocks of this model can select by top_k, threshold"),
        (("dense", "mod"), "predictor", "predictor_weight > 0 teaches more"),
        (("dense",), "best", "must be one of top_k, router, predictor, paced, threshold"),
    ],
)
def test_a_routing_that_was_not_learned_is_refused_wherever_it_is_asked_for(
    pattern, routing, message
):
    config = ModelSpec(20, 8, len(pattern), 2, 2, 16, pattern=pattern)
    tokens_BL, lengths_B = jnp.zeros((1, 4), int), jnp.array([4])
    model = nnx.merge(*random_model(config))
    for ask in (
        lambda: model(tokens_BL, routing=routing),
        lambda: model.prefill(tokens_BL, lengths_B, max_length=8, routing=routing),
        lambda: model.decoder(max_length=8, routing=routing),
    ):
        with pytest.raises(InputError, match=f"routing = '{routing}'.*{message}"):
            ask()


def test_prefill_and_decoding_refuse_what_a_cache_cannot_hold_or_foretell():
    tokens_BL, lengths_B = jnp.zeros((1, 8), int), jnp.array([8])
    mod = MoDConfig(capacity=0.5)
    by_attention, by_score = (
        nnx.merge(*random_model(ModelSpec(20, 8, 2, 2, 2, 16, pattern=("dense", k), mod=mod)))
        for k in ("attention", "mod")
    )
    with pytest.raises(InputError, match="rank by what comes later"):
        by_attention.prefill(tokens_BL, lengths_B, max_length=8, routing="top_k")
    with pytest.raises(InputError, match=r"slack = 0\.5: must be 1 or more"):
        by_score.prefill(tokens_BL, lengths_B, max_length=8, routing="top_k", slack=0.5)
    with pytest.raises(InputError, match="looks at tokens not yet drawn"):
        by_score.decoder(max_length=8, routing="top_k")
