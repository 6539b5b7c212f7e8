"""Causal selection is exact: no requested position is dropped, up to a bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import MoDBlock
from tests.nn.routing.plain import (
    BATCH,
    CONFIG,
    LENGTH,
    VALID,
    X,
    assert_close,
    first_k,
    plain_block,
)
from tests.nn.small import QUICK, WIDTH, Mixer


def with_wanted(wanted):
    """Returns activations whose first number decides the predictor."""
    return np.concatenate([np.where(wanted, 1, -1)[..., None], X[..., 1:]], axis=-1).astype("f4")


def go_by_the_first_number(block):
    block.router.w[...] = jnp.zeros((WIDTH, 1)).at[0].set(0.7)
    block.causal.w_out[...] = jnp.zeros_like(block.causal.w_out[...])


@pytest.mark.parametrize("slots", [None, 5])
def test_every_wanted_position_is_processed_or_counted_whatever_their_number(slots):
    rng = np.random.default_rng(5)
    rngs = nnx.Rngs(0)
    block = MoDBlock(Mixer(rngs), WIDTH, CONFIG, rngs=rngs)
    go_by_the_first_number(block)
    graphdef, params = nnx.split(block)
    call = jax.jit(
        lambda params, x: nnx.merge(graphdef, params)(
            x, valid_BL=VALID, routing="predictor", slots=slots
        ),
        compiler_options=QUICK,
    )
    # The k is 4: none, fewer, as many, a few more, many more, and all.
    for count in (0, 1, 4, 6, 7, 12, 13, 16):
        wanted = np.zeros((BATCH, LENGTH), bool)
        for b, some in enumerate((count, count // 2, LENGTH)):
            wanted[b, rng.permutation(LENGTH)[:some]] = True
        x = with_wanted(wanted)
        y, record = jax.device_get(call(params, x))
        wanted &= VALID
        selected = first_k(wanted, slots or LENGTH)
        np.testing.assert_array_equal(record.requested_BL, wanted)
        np.testing.assert_array_equal(record.selected_BL, selected)
        assert_close(y, plain_block(block, 0.7 * x[..., 0], selected, x))
        untouched = ~selected
        assert y[untouched].tobytes() == x[untouched].tobytes()
