"""Editing a token never changes what comes before it, wherever the routing is causal.

Legend: L positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.specs import Dense, MoD, ModelSpec, Predictor
from tests.nn.small import KINDS, QUICK, behind_a_block, key_values, random_model, taught

LENGTH = 10


# One compiled size: rounding, too, is the same for any number of selected positions.
MOD = {"capacity": 0.7, "causal": Predictor()}


def config_of(layers):
    return ModelSpec(20, 8, len(layers), 2, 1, 16, layers=layers)


def reach(run):
    """Returns the reach of edits, {t: first position whose output changed}, of run(tokens_1L)."""
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
def test_an_edit_changes_nothing_before_it_in_the_call_and_in_reading(routing):
    config = config_of(taught(routing, capacity=0.7))
    graphdef, params = random_model(config, std=0.5, seed=8)
    key = jax.random.key(0)

    def run(params, tokens, length):
        model = nnx.merge(graphdef, params)
        called = model(tokens, key=key, routing=routing)[0]
        read = model.reader(max_length=LENGTH, routing=routing, key=key)
        return called, read(tokens, length, None)

    compiled = jax.jit(run, compiler_options=QUICK)
    assert reach(lambda tokens: compiled(params, tokens, jnp.array([LENGTH]))[0]) == {
        t: t for t in range(1, LENGTH)
    }

    def prompt(tokens, t):
        """Returns the caches after a prompt of t tokens, whatever follows them."""
        logits, cache, depths = compiled(params, tokens, jnp.array([t]))[1]
        kept = [
            leaf[:, :, : int(held.length_B[0])]
            for held in key_values(cache)
            for leaf in (held.k_BGWH, held.v_BGWH)
        ]
        assert len(kept) == 2 * len(cache.layers)
        return jax.tree.leaves((logits, kept, cache.positions_B, depths))

    tokens = np.random.default_rng(0).integers(0, 20, (1, LENGTH))
    for t in (1, 4, LENGTH - 1):
        edited = tokens.copy()
        edited[:, t:] = (tokens[:, t:] + 7) % 20
        for ours, theirs in zip(prompt(tokens, t), prompt(edited, t), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "layers, looks_ahead",
    [
        ((MoD(Dense(), **MOD),), True),
        (behind_a_block("received", **MOD), True),
        (
            behind_a_block(
                "stochastic", "positional", "learned_position", "binary", "threshold", **MOD
            ),
            False,
        ),
    ],
)
def test_the_selection_of_training_looks_ahead_where_positions_compete_by_content(
    layers, looks_ahead
):
    graphdef, params = random_model(config_of(layers), std=0.5, seed=8)
    run = jax.jit(
        lambda params, tokens: nnx.merge(graphdef, params)(tokens, key=jax.random.key(0))[0],
        compiler_options=QUICK,
    )
    reached = reach(lambda tokens: run(params, tokens))
    assert (reached != {t: t for t in range(1, LENGTH)}) == looks_ahead
    assert all(first <= t for t, first in reached.items())


@pytest.mark.parametrize(
    "layers, routing, message",
    [
        (
            behind_a_block("received"),
            "causal",
            r"MoD\(Dense\(\), router=Received\(\), rule=TopK\(weight='one'\)\) has no rule that ",
        ),
        (behind_a_block("received"), "threshold", "has no rule that never looks ahead: MoD has "),
        (behind_a_block("expert_choice"), "auxiliary", "must be one of trained, causal, threshold"),
        (behind_a_block("expert_choice"), "predictor", "must be one of trained, causal, threshold"),
        ((Dense(),), "best", "must be one of trained, causal$"),
    ],
)
def test_a_routing_that_was_not_learned_is_refused_wherever_it_is_asked_for(
    layers, routing, message
):
    config = ModelSpec(20, 8, len(layers), 2, 2, 16, layers=layers)
    tokens_BL = jnp.zeros((1, 4), int)
    model = nnx.merge(*random_model(config))
    for ask in (
        lambda: model(tokens_BL, routing=routing),
        lambda: model.reader(max_length=8, routing=routing),
    ):
        with pytest.raises(InputError, match=f"routing = '{routing}'.*{message}"):
            ask()


def test_reading_and_decoding_refuse_what_a_cache_cannot_hold_or_foretell():
    tokens_BL, lengths_B = jnp.zeros((1, 1), int), jnp.array([1])
    by_attention, by_score = (
        nnx.merge(*random_model(config_of(behind_a_block(router, capacity=0.5))))
        for router in ("received", "expert_choice")
    )
    with pytest.raises(InputError, match="ranks by received, which later positions decide"):
        by_attention.reader(max_length=8, routing="trained")
    with pytest.raises(InputError, match=r"slack = 0\.5: must be 1 or more"):
        by_score.reader(max_length=8, routing="trained", slack=0.5)
    read = by_score.reader(max_length=8, routing="trained")
    _, cache, _ = read(tokens_BL, lengths_B, None)
    with pytest.raises(InputError, match="looks at tokens not yet drawn"):
        read(tokens_BL, lengths_B, cache)
