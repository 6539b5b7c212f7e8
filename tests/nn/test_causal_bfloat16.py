"""Causal and cached passes that compute in bfloat16, against float32.

Legend: B batch, L positions, D width, S steps of decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import Routed
from modjax.specs import Dense, MoD, ModelSpec, Positional, Predictor
from tests.nn.small import QUICK, behind_a_block, key_values, random_model

VOCAB, LENGTH, PROMPT, SLOTS = 20, 12, 3, 6
MOD = {"capacity": 0.5, "causal": Predictor()}
PATTERNS = {
    "predictor": behind_a_block("received", "expert_choice", **MOD),
    "threshold": (MoD(Dense(), **MOD), *behind_a_block("threshold", **MOD)),
    "causal": behind_a_block("positional", "binary", capacity=0.5),
}


def decided_model(config):
    """Returns random parameters with no decision near its boundary, and the tokens that say yes.

    The first dim of the stream stays what the embedding put there, 3/4 or -3/4: it decides, and
    the other dims move every score a little.
    """
    graphdef, params = random_model(config, std=0.5, seed=8)
    yes_V = np.random.default_rng(0).random(VOCAB) < 0.6

    def decide(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        *_, owner, name = ("", *names.split("/"))
        if name == "table":
            leaf[:, 0] = np.where(yes_V, 0.75, -0.75)
        elif name == "w_out" and owner == "0_attention":
            leaf[..., 0] = 0
        elif name == "w_out" and owner == "1_mlp":
            leaf[..., 0, :] = 0
        elif owner == "router":
            leaf *= 0.02
            leaf[:, 0] = [0, 1] if leaf.shape[-1] == 2 else 1
        elif name == "threshold":
            leaf[:] = 0
        elif owner == "causal":
            leaf *= 0.02
            if name == "w_in":
                leaf[:, 0, :2] = [2, -2]
            elif name == "w_out":
                leaf[:, :2] = [2, -2]  # silu(a) - silu(-a) = a
        return leaf

    return graphdef, jax.tree_util.tree_map_with_path(decide, params), yes_V


def relative_error(found_BLV, exact_BLV):
    return np.sqrt(np.mean(np.square(found_BLV - exact_BLV)) / np.mean(np.square(exact_BLV)))


@pytest.mark.parametrize(
    "routing", ["predictor", pytest.param("threshold", marks=pytest.mark.slow), "causal"]
)
def test_cached_decoding_in_bfloat16_is_as_close_to_float32_as_the_uncached_pass(routing):
    layers = PATTERNS[routing]
    config = ModelSpec(VOCAB, 8, len(layers), 2, 2, 16, layers=layers, dtype="bfloat16")
    config.check_routing(routing, "routing")
    graphdef, params, yes_V = decided_model(config)
    exact_graphdef = random_model(dataclasses.replace(config, dtype="float32"))[0]
    tokens_BL = np.random.default_rng(9).integers(0, VOCAB, (2, LENGTH))

    def run(params):
        model = nnx.merge(graphdef, params)
        options = {"routing": routing, "slack": 1.0}
        exact = nnx.merge(exact_graphdef, params)(jnp.asarray(tokens_BL), **options)
        called = model(jnp.asarray(tokens_BL), **options)
        read = model.reader(max_length=LENGTH, **options)
        first_BV, cache, depth_BL = read(tokens_BL[:, :PROMPT], jnp.full(2, PROMPT), None)

        def one(cache, tokens_B):
            logits_BV, cache, depth_B1 = read(tokens_B[:, None], jnp.full(2, 1), cache)
            return cache, (logits_BV, depth_B1[:, 0])

        last, (logits_SBV, depth_SB) = jax.lax.scan(one, cache, tokens_BL.T[PROMPT:])
        logits_BSV = jnp.concatenate([first_BV[:, None], logits_SBV.swapaxes(0, 1)], axis=1)
        depth_BL = jnp.concatenate([depth_BL, depth_SB.T], axis=1)
        return exact, called, (logits_BSV, depth_BL, cache, last)

    results = jax.device_get(jax.jit(run, compiler_options=QUICK)(params))
    (exact_BLV, exact_records), (called_BLV, records), (cached_BSV, depth_BL, *caches) = results
    for cache in caches:
        assert len(key_values(cache)) == len(layers)
        for held in key_values(cache):
            assert held.k_BGWH.dtype == held.v_BGWH.dtype == jnp.bfloat16
            assert np.all(np.isfinite(np.float32(held.k_BGWH) + np.float32(held.v_BGWH)))
    assert called_BLV.dtype == cached_BSV.dtype == np.float32
    # The passes round to 8 bits some 8 times a layer, each time by 2^-9 at most.
    rounding = 8 * 2**-9
    after = slice(PROMPT - 1, None)
    assert 0 < relative_error(called_BLV, exact_BLV) < rounding
    assert 0 < relative_error(cached_BSV, exact_BLV[:, after]) < rounding
    assert relative_error(cached_BSV, called_BLV[:, after]) < rounding / 2
    expected_depth_BL, dropped = np.zeros(tokens_BL.shape, int), 0
    for name, record in records.items():
        if not isinstance(record, Routed):
            continue
        requested_BL = yes_V[tokens_BL]
        if layers[int(name[0])].rule == Positional():
            requested_BL = np.broadcast_to(np.arange(LENGTH) % 2 == 1, tokens_BL.shape)
        selected_BL = requested_BL & (np.cumsum(requested_BL, axis=1) <= SLOTS)
        for found in (record, exact_records[name]):
            np.testing.assert_array_equal(found.selected_BL[0], selected_BL)
        scores_BL = record.scores_BL
        assert scores_BL.dtype == np.float32
        if routing == "predictor":
            assert records[f"{name}/causal"].logits_BL.dtype == np.float32
        assert relative_error(scores_BL, exact_records[name].scores_BL) < 2**-9
        expected_depth_BL += selected_BL
        dropped += np.sum(requested_BL & ~selected_BL)
    np.testing.assert_array_equal(depth_BL, expected_depth_BL)
    assert dropped > 0
