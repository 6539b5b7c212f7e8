"""Bounds on the cycles of kernels: splash attention at sizes whose schedules were read by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from modjax.aot.kernels import kernels_of, text_of
from modjax.aot.program import Program
from tests.aot.described import compiled_on

WIDTH, HEADS, LAYERS = 128, 2, 3
ROWS = 256  # too many for the fast memory


def gradient(length, block):
    """Returns the gradient of attention in a loop of LAYERS, as a step has it."""
    sizes = {name: block for name in ("block_q", "block_kv", "block_kv_compute")}
    backward = {f"{name}_dkv": block for name in ("block_q", "block_kv")}
    blocks = splash.BlockSizes(
        **sizes, **backward, block_kv_dkv_compute=block, use_fused_bwd_kernel=True
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * HEADS)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)

    def layer(x, _):
        with jax.named_scope("attention"):
            return jax.vmap(kernel)(x, x, x), None

    def total(x):
        return jnp.sum(jax.lax.scan(layer, x, length=LAYERS)[0].astype(jnp.float32))

    return jax.grad(total)


# Cycles of one sequence and head.
@pytest.mark.parametrize(
    "length, block, forward, backward", [(256, 256, 1_050, 1_160), (2048, 512, 18_000, 32_000)]
)
def test_the_bounds_of_splash_attention_are_those_read_by_hand(length, block, forward, backward):
    shape = (ROWS, HEADS, length, WIDTH)
    compiled = compiled_on("v5e:1x1", gradient(length, block), (shape, None))
    found = kernels_of(Program(text_of(compiled)), "v5e:1x1", "v5e")
    each = {re.findall("fwd|dkv", one.name)[0]: one for one in found}
    assert [(one.part, one.times) for one in found] == [("attention", LAYERS)] * 2
    for name, expected in (("fwd", forward), ("dkv", backward)):
        assert each[name].cycles / (ROWS * HEADS) == pytest.approx(expected, rel=0.12)


def test_a_mask_that_the_text_does_not_show_leaves_no_bound():
    compiled = compiled_on("v5e:1x1", gradient(1024, 256), ((1, HEADS, 1024, WIDTH), None))
    found = kernels_of(Program(compiled.as_text()), "v5e:1x1", "v5e")
    assert [one.cycles for one in found] == [None, None]
