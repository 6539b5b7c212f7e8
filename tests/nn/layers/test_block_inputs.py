"""Routed block in a foreign model: masks, biases and memory reach its inner block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from modjax.errors import InputError
from modjax.nn import MoDBlock
from modjax.specs import MoDConfig, TopK
from tests.nn.small import QUICK, WIDTH, mod_block, stream

LENGTH = 16


def minus_infinity(q_BKNH, k_BKNH, v_BKNH, bias, mask):
    """Attention that is NaN for a softmax over nothing."""
    s_BNKM = jnp.einsum("BKNH,BMNH->BNKM", q_BKNH, k_BKNH) / 2 + bias
    p_BNKM = jax.nn.softmax(jnp.where(mask > 0, s_BNKM, -jnp.inf))
    return jnp.einsum("BNKM,BMNH->BKNH", p_BNKM, v_BKNH)


class Attending(nnx.Module):
    """Masked attention in 2 heads of 4, and a memory that all positions share."""

    def __init__(self, attend, rngs):
        self.attend = attend
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, WIDTH, 2, 4)) / 2)

    def __call__(self, x_BLD, *, mask, bias, memory):
        q, k, v = jnp.einsum("BLD,ADNH->ABLNH", x_BLD, self.w[...])
        out_BLD = self.attend(q, k, v, bias=bias, mask=mask).reshape(x_BLD.shape)
        return x_BLD + out_BLD + jnp.tanh(x_BLD) * jnp.mean(memory, axis=1, keepdims=True)


def plain_attending(w, router, x, bias, memory, selected, valid):
    """Returns the same token by token: each sees the selected tokens up to itself."""
    rows = []
    for b, sequence in enumerate(x):
        chosen = np.flatnonzero(selected[b])
        assert np.all(valid[b][chosen])
        out = [sequence[i] for i in range(len(sequence))]
        for i in chosen:
            seen = chosen[chosen <= i]
            heads = []
            for n in range(2):
                q, k, v = (sequence[np.append(seen, i)] @ w[a, :, n] for a in range(3))
                p = jax.nn.softmax(k[:-1] @ q[-1] / 2 + bias[0, n, i, seen])
                heads.append(p @ v[:-1])
            update = jnp.concatenate(heads) + jnp.tanh(sequence[i]) * memory[b].mean(axis=0)
            out[i] = sequence[i] + (sequence[i] @ router) * update
        rows.append(jnp.stack(out))
    return jnp.stack(rows)


@pytest.mark.parametrize(
    ("attend", "routing"), [(nnx.dot_product_attention, "auxiliary"), (minus_infinity, "trained")]
)
def test_masks_biases_and_memory_reach_the_inner_block(attend, routing):
    rngs = nnx.Rngs(0)
    inner = Attending(attend, rngs)
    config = MoDConfig(capacity=0.5, rule=TopK(auxiliary=0.1))
    block = MoDBlock(inner, WIDTH, config, rngs=rngs)
    x = stream(batch=3, length=8)
    valid = jnp.arange(8)[None] < jnp.array([[8], [2], [0]])  # rows 1 and 2 can't select four
    bias = jax.random.normal(jax.random.key(1), (1, 2, 8, 8))
    memory = jax.random.normal(jax.random.key(2), (3, 5, WIDTH))
    causal = nnx.make_causal_mask(jnp.zeros((3, 8)))
    mask = nnx.combine_masks(causal, nnx.make_attention_mask(valid, valid))
    graphdef, params = nnx.split(block)

    def run(params, x, bias, memory):
        pairwise, whole = {"mask": mask, "bias": bias}, {"memory": memory}
        block = nnx.merge(graphdef, params)
        return block(x, pairwise=pairwise, whole=whole, valid_BL=valid, routing=routing)

    y, record = jax.jit(run, compiler_options=QUICK)(params, x, bias, memory)
    selected = np.asarray(record.selected_BL)
    if routing == "trained":
        np.testing.assert_array_equal(selected.sum(axis=1), [4, 1, 0])

    def ours(*arguments):
        return jnp.sum(jnp.sin(run(*arguments)[0]))

    def plain(w, router, x, bias, memory):
        out = plain_attending(w, router, x, bias, memory, selected, np.asarray(valid))
        return jnp.sum(jnp.sin(out)), out

    arrays = (inner.w[...], block.router.w[..., 0], x, bias, memory)
    differentiate = jax.grad(plain, (0, 1, 2, 3, 4), has_aux=True)
    grads, expected = jax.jit(differentiate, compiler_options=QUICK)(*arrays)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    got = jax.jit(jax.grad(ours, (0, 1, 2, 3)), compiler_options=QUICK)(params, x, bias, memory)
    got = (got[0]["inner"]["w"][...], got[0]["router"]["w"][..., 0], *got[1:])
    for ours, theirs in zip(got, grads, strict=True):
        assert float(jnp.abs(theirs).max()) > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class WithFlax(nnx.Module):
    """Attention of Flax."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x_BLD, *, mask):
        return x_BLD + self.attention(x_BLD, mask=mask)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_causal_mask_of_flax_works_in_a_multi_head_attention_of_flax(rows):
    rngs = nnx.Rngs(0)
    inner = WithFlax(rngs)
    block = MoDBlock(inner, WIDTH, MoDConfig(capacity=0.4), rngs=rngs)
    x = stream(batch=3, length=10)
    mask = nnx.make_causal_mask(jnp.zeros((rows, 10)))
    y, record = jax.jit(block, compiler_options=QUICK)(x, pairwise={"mask": mask})
    run = jax.jit(inner, compiler_options=QUICK)
    for b in range(3):
        chosen = np.flatnonzero(record.selected_BL[b])
        assert len(chosen) == 4
        picked = x[b : b + 1, chosen]
        update = run(picked, mask=jnp.tril(jnp.ones((4, 4)))[None, None]) - picked
        r = np.asarray(x[b, chosen] @ block.router.w[..., 0])[:, None]
        np.testing.assert_allclose(y[b, chosen], x[b, chosen] + r * update[0], rtol=1e-4, atol=1e-5)


MASK, MEMORY = np.ones((3, 1, LENGTH, LENGTH)), np.ones((3, 5, WIDTH))


@pytest.mark.parametrize(
    ("arguments", "keywords", "said"),
    [
        ([MASK], {}, "per_position[0] = (3, 1, 16, 16): must have the shape (3 or 1, 16, ...)"),
        ([np.ones((3, 16)), {"memory": MEMORY}], {}, "per_position[1]['memory'] = (3, 5, 8): must"),
        ([np.ones((2, 16))], {}, "per_position[0] = (2, 16): must"),
        ([np.arange(16)], {}, "per_position[0] = (16,): must"),
        ([0.5], {}, "per_position[0] = (): must"),
        (
            [],
            {"pairwise": {"mask": MASK[:, :, :1]}},
            "pairwise['mask'] = (3, 1, 1, 16): must have the shape (3 or 1, heads or 1, 16, 16)",
        ),
        ([], {"pairwise": {"mask": MASK[:2]}}, "pairwise['mask'] = (2, 1, 16, 16): must"),
        ([], {"pairwise": {"mask": MASK[:, 0]}}, "pairwise['mask'] = (3, 16, 16): must"),
    ],
)
def test_what_cannot_be_gathered_is_refused_in_one_line(arguments, keywords, said):
    with pytest.raises(InputError) as caught:
        mod_block(capacity=0.25)(stream(), *arguments, **keywords)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value) and "`whole`" in str(caught.value)


def test_masks_and_memory_pass_through_the_bridge_to_linen():
    class TheirModel(linen.Module):
        @linen.compact
        def __call__(self, x_BLD, mask, memory):
            def routed(rngs):
                inner = Attending(nnx.dot_product_attention, rngs)
                return MoDBlock(inner, WIDTH, MoDConfig(capacity=0.5), rngs=rngs)

            block = bridge.to_linen(routed, name="routed")
            pairwise = {"mask": mask, "bias": jnp.zeros((1, 1, LENGTH, LENGTH))}
            return block(x_BLD, pairwise=pairwise, whole={"memory": memory})[0]

    x, memory = stream(), jnp.ones((3, 5, WIDTH))
    causal = nnx.make_causal_mask(jnp.zeros((3, LENGTH)))
    variables = TheirModel().init(jax.random.key(1), x, causal, memory)
    run = jax.jit(TheirModel().apply, compiler_options=QUICK)
    y = run(variables, x, causal, memory)
    for other in (
        run(variables, x, jnp.ones_like(causal), memory),
        run(variables, x, causal, 2 * memory),
    ):
        changed = np.any(np.asarray(y != other), axis=-1)
        assert 0 < changed.sum(axis=1).min() and changed.sum(axis=1).max() <= 8
