"""Reading and decoding with caches equal the uncached causal forward pass.

Legend: B batch, L positions, S steps of decoding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.flops import cache_bytes
from modjax.nn import Routed
from modjax.nn.cache import overflow
from modjax.specs import (
    MLP,
    Attention,
    Blocks,
    Causal,
    Dense,
    MoD,
    ModelSpec,
    Predictor,
    Seq,
    TopK,
    Window,
    cache_slots,
)
from tests.nn.small import KINDS, QUICK, SCHEMES, behind_a_block, key_values, random_model, taught

MOD = MoD(Dense(), capacity=0.5, rule=TopK(auxiliary=1.0), causal=Predictor())
LENGTH = 12
# Ragged prompts, and a row that ends before the others.
LENGTHS, TOTALS = (1, 3, 2), (12, 8, 12)


def capacity(share):
    return dataclasses.replace(MOD, capacity=share)


def model_config(*layers, **changes):
    values = {"d_model": 8, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16} | changes
    return ModelSpec(20, num_layers=len(layers), layers=layers, **values)


@functools.cache
def both_ways(config, routing, slack, lengths=LENGTHS, totals=TOTALS, seed=33):
    """Runs the uncached call and the cached calls over the same tokens, in one program.

    What follows the prompts is decoded token by token, and also read as one turn.
    """
    graphdef, params = random_model(config, std=0.5, seed=seed)
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
    turns_B = totals_B - lengths_B
    turn_1L = jnp.arange(max(t - n for n, t in zip(lengths, totals, strict=True)))[None]
    turns_BL = jnp.take_along_axis(
        tokens_BL, jnp.minimum(lengths_B[:, None] + turn_1L, LENGTH - 1), axis=1
    )
    turns_BL = jnp.where(turn_1L < turns_B[:, None], turns_BL, 19 - turns_BL)

    def run(params, key):
        model = nnx.merge(graphdef, params)
        logits_BLV, records = model(
            tokens_BL, valid_BL.astype(jnp.int32), key=key, routing=routing, slack=slack
        )
        masks = {
            name: {mask: getattr(record, mask) for mask in ("requested_BL", "selected_BL")}
            for name, record in records.items()
            if isinstance(record, Routed)
        }
        read = model.reader(max_length=LENGTH, routing=routing, slack=slack, key=key)
        first_BV, cache, depths_BL = read(prompts_BL, lengths_B, None)

        def one(cache, _):
            active_B = cache.positions_B < totals_B
            token_B = tokens_BL[rows_B, jnp.minimum(cache.positions_B, LENGTH - 1)]
            logits_BV, after, depth_B1 = read(token_B[:, None], active_B.astype(int), cache)
            return after, (logits_BV, depth_B1[:, 0], active_B, cache.positions_B, after)

        steps = max(total - length for length, total in zip(lengths, totals, strict=True))
        last, decoded = jax.lax.scan(one, cache, length=steps + 1)
        turn = read(turns_BL, turns_B, cache)
        return (logits_BLV, masks), (first_BV, cache, depths_BL), decoded, last, turn

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, jax.random.key(3)))


def check_both_ways(config, routing, slack, lengths=LENGTHS, totals=TOTALS, seed=33):
    """Returns the cache after the prompts, and each routed layer's masks of the uncached call."""
    config.check_routing(routing, "routing")
    results = both_ways(config, routing, slack, lengths, totals, seed)
    (logits_BLV, masks), (first_BV, cache, depths_BL), decoded, last, turn = results
    assert 0.1 < np.std(logits_BLV) < 10
    layers = [
        {mask: value_GBL[g] for mask, value_GBL in masks[f"{i}_mod"].items()}
        if layer.routed()
        else None
        for g in range(config.num_layers // len(config.layers))
        for i, layer in enumerate(config.layers)
    ]
    routed = [layer for layer in layers if layer is not None]
    depth_BL = sum(layer["selected_BL"].astype(int) for layer in routed)
    logits_SBV, depth_SB, active_SB, positions_SB, caches_S = decoded
    later_BV, extended, later_BL = turn
    np.testing.assert_array_equal(extended.positions_B, totals)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for b, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        close(first_BV[b], logits_BLV[b, length - 1])
        np.testing.assert_array_equal(depths_BL[b, :length], depth_BL[b, :length])
        np.testing.assert_array_equal(depths_BL[b, length:], 0)
        active_S = active_SB[:, b]
        np.testing.assert_array_equal(positions_SB[active_S, b], np.arange(length, total))
        close(logits_SBV[active_S, b], logits_BLV[b, length:total])
        np.testing.assert_array_equal(depth_SB[active_S, b], depth_BL[b, length:total])
        close(later_BV[b], logits_BLV[b, total - 1])
        np.testing.assert_array_equal(later_BL[b, : total - length], depth_BL[b, length:total])
        np.testing.assert_array_equal(later_BL[b, total - length :], 0)
        # A row that is not active keeps its caches, bit for bit, while others go on.
        done_S = np.flatnonzero(~active_S)
        assert len(done_S) > 0 and not np.any(depth_SB[done_S, b])
        for leaf_SB in jax.tree.leaves(caches_S):
            for s in done_S:
                np.testing.assert_array_equal(leaf_SB[s, b], leaf_SB[s - 1, b])
        for read, stepped in zip(key_values(extended), key_values(last), strict=True):
            count = stepped.length_B[b]
            for name in ("k_BGWH", "v_BGWH"):
                ours, theirs = getattr(read, name), getattr(stepped, name)
                close(ours[b, :, :count], theirs[b, :, :count])
        for layer_cache, layer in zip(last.layers + extended.layers, layers + layers, strict=True):
            wanted, selected = (
                (total, total)
                if layer is None
                else (layer["requested_BL"][b].sum(), layer["selected_BL"][b].sum())
            )
            (held,) = key_values(layer_cache)
            assert held.length_B[b] == selected
            if layer is None:
                assert overflow(layer_cache) == 0
            else:
                assert layer_cache.taken_B[b] == selected
                assert layer_cache.overflow_B[b] == wanted - selected
    return cache, routed


def overflows(layer):
    return int(np.sum(layer["requested_BL"] & ~layer["selected_BL"]))


DEFAULT = [("causal", None)]
DEFAULT += [("auxiliary", slack) for slack in (None, 1.0)]


@pytest.mark.parametrize(
    "routing, slack",
    [
        pytest.param(routing, slack, marks=[] if (routing, slack) in DEFAULT else pytest.mark.slow)
        for routing in KINDS
        for slack in (None, 1.0)
    ],
)
def test_cached_decoding_equals_the_uncached_pass_for_every_router(routing, slack):
    # Exact caches are compiled for few sizes where the capacity is large.
    config = model_config(*taught(routing, capacity=0.25 if slack else 0.7))
    _, routed = check_both_ways(config, routing, slack)
    for layer in routed:
        assert 0 < layer["selected_BL"].sum() < sum(TOTALS)
    full = sum(overflows(layer) > 0 for layer in routed)
    assert full >= 2 if slack else full == 0


def test_every_way_to_select_is_decoded_by_every_causal_routing_that_it_has():
    for name in SCHEMES:
        for causal in (None, Predictor()):
            (layer,) = behind_a_block(name, auxiliary=1.0, causal=causal)[1:]
            for routing in layer.causal_rules():
                assert name in KINDS[routing if routing in KINDS else "causal"]


def test_long_prompts_overflow_alike_with_grouped_queries_and_capacities_of_their_own():
    layers = (Dense(), MOD, Dense(), capacity(0.25))
    config = model_config(*layers, num_heads=4, num_kv_heads=2, d_ff=32)
    cache, routed = check_both_ways(config, "threshold", 1.0, (9, 2, 5), (12, 12, 7))
    for i, layer, slots in ((1, routed[0], 6), (3, routed[1], 3)):
        (held,) = key_values(cache.layers[i])
        assert held.k_BGWH.shape == (3, 2, slots, 2)
        assert cache.layers[i].overflow_B[0] > 0 or overflows(layer) > 0
    counted = sum(held.k_BGWH.nbytes + held.v_BGWH.nbytes for held in key_values(cache))
    assert counted == 3 * cache_bytes(config, LENGTH, 1.0)


def test_rings_of_slots_hold_what_a_bounded_mask_shows():
    """Covers prompts and turns longer and shorter than a ring, and selections of positions."""
    window, both, lone = (
        Seq(Attention(mask=mask, softcap=2.0), MLP())
        for mask in (
            Causal() & Window(3),
            Causal() & Window(5) & Blocks(4),
            Causal() & Window(1),
        )
    )
    some = {"capacity": 0.7, "causal": Predictor()}
    config = model_config(
        window, MoD(window, **some), both, MoD(both, **some), lone, num_heads=4, num_kv_heads=2
    )
    cache, routed = check_both_ways(config, "causal", None, (9, 1, 5), (12, 8, 12), seed=0)
    assert all(0 < layer["selected_BL"].sum() < sum((12, 8, 12)) for layer in routed)
    slots = [held.k_BGWH.shape[2] for held in key_values(cache)]
    assert slots == [3, 3, 4, 4, 1]
    counted = sum(held.k_BGWH.nbytes + held.v_BGWH.nbytes for held in key_values(cache))
    assert counted == 3 * cache_bytes(config, LENGTH)


def test_a_lone_row_through_routed_blocks_only():
    config = dataclasses.replace(model_config(MOD), num_layers=2)
    cache, routed = check_both_ways(config, "auxiliary", None, (4,), (11,))
    assert len(routed) == 2
    counted = sum(held.k_BGWH.nbytes + held.v_BGWH.nbytes for held in key_values(cache))
    assert counted == cache_bytes(config, LENGTH)


@pytest.mark.parametrize("slack, slots", [(None, 100), (1.0, 12), (1.5, 18), (9.0, 100)])
def test_bytes_of_caches_are_counted_without_building_them(slack, slots):
    config = model_config(
        Dense(), capacity(0.12), dtype="bfloat16", num_heads=4, num_kv_heads=1, d_model=24
    )
    graphdef, params = random_model(config)
    cache = jax.eval_shape(
        lambda params: nnx.merge(graphdef, params).reader(
            max_length=100, routing="auxiliary", slack=slack
        )(jnp.zeros((2, 5), int), jnp.array([5, 3]), None)[1],
        params,
    )
    held = key_values(cache)
    assert [each.k_BGWH.shape for each in held] == [(2, 1, m, 6) for m in (100, slots)]
    assert all(each.v_BGWH.dtype == jnp.bfloat16 for each in held)
    assert cache_slots(0.12, 100, slack) == slots
    # Keys and values of 2 bytes, and 6 wide.
    assert cache_bytes(config, 100, slack) == (100 + slots) * 6 * 2 * 2
