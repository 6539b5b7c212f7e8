"""Prefill and decoding with caches equal the uncached causal forward pass.

Legend: B batch, L positions, S steps of decoding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.flops import cache_bytes, cache_slots
from modjax.spec import PATTERN_ENTRIES, ROUTINGS, MoDConfig, ModelSpec
from tests.nn.small import KINDS, QUICK, random_model

MOD = MoDConfig(capacity=0.5, predictor_weight=1.0, auxiliary_weight=1.0)
LENGTH = 12
# Ragged prompts, and a row that ends before the others.
LENGTHS, TOTALS = (1, 3, 2), (12, 8, 12)


def model_config(pattern, **changes):
    values = {"d_model": 8, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "mod": MOD} | changes
    return ModelSpec(20, num_layers=len(pattern), pattern=pattern, **values)


@functools.cache
def both_ways(config, routing, slack, lengths=LENGTHS, totals=TOTALS):
    """The uncached call and the cached one over the same tokens, in one program."""
    graphdef, params = random_model(config, std=0.5, seed=8)
    lengths_B, totals_B = jnp.array(lengths), jnp.array(totals)
    rows_B = jnp.arange(len(lengths))
    rng = np.random.default_rng(1)
    tokens_BL = jnp.asarray(rng.integers(0, 20, (len(lengths), LENGTH)))
    # What follows a prompt or an end is padding, and must not matter.
    prompts_BL = tokens_BL[:, : max(lengths)]
    prompts_BL = jnp.where(
        jnp.arange(max(lengths))[None] < lengths_B[:, None], prompts_BL, 19 - prompts_BL
    )
    valid_BL = jnp.arange(LENGTH)[None] < totals_B[:, None]

    def run(params, key):
        model = nnx.merge(graphdef, params)
        logits_BLV, aux = model(
            tokens_BL, valid_BL.astype(jnp.int32), key=key, routing=routing, slack=slack
        )
        masks = {
            name: {mask: slot[mask] for mask in ("wanted_BL", "selected_BL")}
            for name, slot in aux.items()
        }
        first_BV, cache, depths_BL = model.prefill(
            prompts_BL, lengths_B, max_length=LENGTH, routing=routing, slack=slack, key=key
        )
        step = model.decoder(max_length=LENGTH, routing=routing, key=key)

        def one(cache, _):
            active_B = cache.positions_B < totals_B
            token_B = tokens_BL[rows_B, jnp.minimum(cache.positions_B, LENGTH - 1)]
            logits_BV, after, depth_B = step(token_B, active_B, cache)
            return after, (logits_BV, depth_B, active_B, cache.positions_B, after)

        steps = max(total - length for length, total in zip(lengths, totals, strict=True))
        last, decoded = jax.lax.scan(one, cache, length=steps + 1)
        return (logits_BLV, masks), (first_BV, cache, depths_BL), decoded, last

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, jax.random.key(3)))


def check_both_ways(config, routing, slack, lengths=LENGTHS, totals=TOTALS):
    """Returns the cache after the prompts, and each routed layer's masks of the uncached call."""
    config.check_routing(routing, "routing")
    results = both_ways(config, routing, slack, lengths, totals)
    (logits_BLV, aux), (first_BV, cache, depths_BL), decoded, last = results
    assert 0.1 < np.std(logits_BLV) < 10
    layers = [
        {mask: value_GBL[g] for mask, value_GBL in aux[f"{i}_{slot.kind}"].items()}
        if slot.routed else None
        for g in range(config.num_groups) for i, slot in enumerate(config.slots)
    ]  # fmt: skip
    routed = [layer for layer in layers if layer is not None]
    depth_BL = sum(layer["selected_BL"].astype(int) for layer in routed)
    logits_SBV, depth_SB, active_SB, positions_SB, caches_S = decoded
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for b, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        close(first_BV[b], logits_BLV[b, length - 1])
        np.testing.assert_array_equal(depths_BL[b, :length], depth_BL[b, :length])
        np.testing.assert_array_equal(depths_BL[b, length:], 0)
        active_S = active_SB[:, b]
        np.testing.assert_array_equal(positions_SB[active_S, b], np.arange(length, total))
        close(logits_SBV[active_S, b], logits_BLV[b, length:total])
        np.testing.assert_array_equal(depth_SB[active_S, b], depth_BL[b, length:total])
        # A row that is not active keeps its caches, bit for bit, while others go on.
        done_S = np.flatnonzero(~active_S)
        assert len(done_S) > 0 and not np.any(depth_SB[done_S, b])
        for leaf_SB in jax.tree.leaves(caches_S):
            for s in done_S:
                np.testing.assert_array_equal(leaf_SB[s, b], leaf_SB[s - 1, b])
        for layer_cache, layer in zip(last.layers, layers, strict=True):
            wanted, selected = (
                (total, total) if layer is None
                else (layer["wanted_BL"][b].sum(), layer["selected_BL"][b].sum())
            )  # fmt: skip
            assert layer_cache.length_B[b] == selected
            assert layer_cache.overflow_B[b] == wanted - selected
    return cache, routed


def overflows(layer):
    return int(np.sum(layer["wanted_BL"] & ~layer["selected_BL"]))


@pytest.mark.parametrize(
    "routing, slack",
    [(routing, slack) for routing in KINDS for slack in (None, 1.0)],
)
def test_cached_decoding_equals_the_uncached_pass_for_every_router(routing, slack):
    # Exact caches are compiled for few sizes where the capacity is large.
    mod = dataclasses.replace(MOD, capacity=0.25 if slack else 0.7)
    _, routed = check_both_ways(model_config(KINDS[routing], mod=mod), routing, slack)
    for layer in routed:
        assert 0 < layer["selected_BL"].sum() < sum(TOTALS)
    full = sum(overflows(layer) > 0 for layer in routed)
    assert full >= 2 if slack else full == 0


def test_every_router_is_decoded_by_every_causal_routing_that_it_supports():
    for kind in PATTERN_ENTRIES[1:]:
        config = model_config(("dense", kind))
        for routing in ROUTINGS[1:]:
            try:
                config.check_routing(routing, "routing")
            except InputError:
                assert kind not in KINDS[routing]
            else:
                assert kind in KINDS[routing]


def test_long_prompts_overflow_alike_with_grouped_queries_and_capacities_of_their_own():
    pattern = ("dense", "mod", "dense", "mod:0.25")
    config = model_config(pattern, num_heads=4, num_kv_heads=2, d_ff=32)
    cache, routed = check_both_ways(config, "threshold", 1.0, (9, 2, 5), (12, 12, 7))
    for i, layer, slots in ((1, routed[0], 6), (3, routed[1], 3)):
        assert cache.layers[i].k_BGMH.shape == (3, 2, slots, 2)
        assert cache.layers[i].overflow_B[0] > 0 or overflows(layer) > 0
    counted = sum(part.nbytes for layer in cache.layers for part in (layer.k_BGMH, layer.v_BGMH))
    assert counted == 3 * cache_bytes(config, LENGTH, 1.0)


def test_a_lone_row_through_routed_blocks_only():
    config = dataclasses.replace(model_config(("mod",)), num_layers=2)
    cache, routed = check_both_ways(config, "router", None, (4,), (11,))
    assert len(routed) == 2
    assert sum(part.nbytes for layer in cache.layers for part in layer[:2]) == cache_bytes(
        config, LENGTH
    )


@pytest.mark.parametrize("slack, slots", [(None, 100), (1.0, 12), (1.5, 18), (9.0, 100)])
def test_bytes_of_caches_are_counted_without_building_them(slack, slots):
    config = model_config(
        ("dense", "mod:0.12"), dtype="bfloat16", num_heads=4, num_kv_heads=1, d_model=24
    )
    graphdef, params = random_model(config)
    cache = jax.eval_shape(
        lambda params: nnx.merge(graphdef, params).prefill(
            jnp.zeros((2, 5), int), jnp.array([5, 3]), max_length=100, routing="router", slack=slack
        )[1],
        params,
    )
    assert [layer.k_BGMH.shape for layer in cache.layers] == [(2, 1, m, 6) for m in (100, slots)]
    assert all(layer.v_BGMH.dtype == jnp.bfloat16 for layer in cache.layers)
    assert cache_slots(0.12, 100, slack) == slots
    # Keys and values of 2 bytes, and 6 wide.
    assert cache_bytes(config, 100, slack) == (100 + slots) * 6 * 2 * 2
