"""Values that the inner block of a foreign model returns beside x.

Legend: B batch, L positions, K selected positions, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.errors import InputError
from modjax.nn import Inside, MoDBlock, TokenLoss, losses, statistics, totals
from tests.nn.layers.with_experts import CONFIG, B, K, L, WithExperts, X
from tests.nn.small import QUICK, WIDTH
from tests.nn.test_records import Reward


class Beside(NamedTuple):
    x: jax.Array
    first_BK: jax.Array
    note: dict[str, jax.Array]


class Returns(nnx.Module):
    """Inner block that doubles x and returns the first number of every position beside it."""

    def __init__(self, form: str):
        self.form = form

    def __call__(self, x_BKD):
        first_BK, y_BKD = x_BKD[..., 0], 2 * x_BKD
        return {
            "x alone": y_BKD,
            "tuple": (y_BKD, first_BK, {"scalar": jnp.float32(3)}),
            "named": Beside(y_BKD, first_BK, {"scalar": jnp.float32(3)}),
            "dictionary": {"aux": first_BK, "hidden": y_BKD},
            "record": (y_BKD, {"reward": Reward(first_BK)}),
            "one number": jnp.mean(y_BKD, axis=-1, keepdims=True),
            "too wide": (jnp.concatenate([y_BKD, y_BKD], axis=-1), first_BK),
            "a list of names": ("x", first_BK),
            "a word": (y_BKD, {"note": "first"}),
        }[self.form]


def returned(form, *, output="x", routing="trained", **options):
    block = MoDBlock(Returns(form), WIDTH, CONFIG, rngs=nnx.Rngs(0), output=output)
    return block(jnp.asarray(X), routing=routing, **options)


FIRST = {
    "tuple": lambda extra: extra[0],
    "named": lambda extra: extra.first_BK,
    "dictionary": lambda extra: extra["aux"],
}


@pytest.mark.parametrize("routing", ["trained", "predictor"])
@pytest.mark.parametrize("form", FIRST)
def test_what_the_inner_block_returns_beside_x_comes_back_with_its_positions(form, routing):
    output = "hidden" if form == "dictionary" else "x"
    valid_BL = np.arange(L)[None] < np.array([[12], [4]])
    y, routed = returned(form, output=output, routing=routing, valid_BL=valid_BL)
    alone, plain = returned("x alone", routing=routing, valid_BL=valid_BL)
    np.testing.assert_array_equal(y, alone)
    assert plain.extra is None and plain.indices_BK is None
    np.testing.assert_allclose(routed.loss(), plain.loss())
    first_BK = np.asarray(FIRST[form](routed.extra))
    assert first_BK.shape == (B, K if routing == "trained" else L)
    for b in range(B):
        selected = np.flatnonzero(routed.selected_BL[b])
        assert 0 < len(selected) < L
        np.testing.assert_array_equal(routed.indices_BK[b][routed.valid_BK[b]], selected)
        np.testing.assert_array_equal(first_BK[b][routed.valid_BK[b]], X[b, selected, 0])
    if form == "named":
        assert isinstance(routed.extra, Beside) and routed.extra.x is None
        assert routed.extra.note["scalar"] == 3
    if form == "dictionary":
        assert set(routed.extra) == {"aux"}


def test_a_record_from_inside_looks_at_the_loss_of_the_selected_positions():
    _, routed = returned("record")
    nll = np.random.default_rng(1).random((B, L)).astype(np.float32)
    seen = np.stack([nll[b, np.flatnonzero(routed.selected_BL[b])] for b in range(B)])
    first = np.stack([X[b, np.flatnonzero(routed.selected_BL[b]), 0] for b in range(B)])
    own = float(returned("x alone")[1].loss())
    expected = own - (first * seen).mean()
    np.testing.assert_allclose(routed.loss(TokenLoss(nll)), expected, rtol=1e-5)
    stacked = {"routed": jax.tree.map(lambda leaf: leaf[None], routed)}
    np.testing.assert_allclose(losses(stacked, TokenLoss(nll)), expected, rtol=1e-5)
    said = statistics(stacked)
    np.testing.assert_allclose(said["routed/0/reward/chance"], first.mean(), rtol=1e-5)
    assert 0 < said["router/capacity"] < 1


def test_our_experts_in_somebodys_block_keep_their_losses():
    block = MoDBlock(WithExperts(nnx.Rngs(1)), WIDTH, CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(block)
    valid_BL = np.arange(L)[None] < np.array([[12], [4]])

    def loss(params):
        positions_BL = jnp.arange(L)[None]
        _, routed = nnx.merge(graphdef, params)(
            X, positions_BL, jnp.asarray(valid_BL), valid_BL=jnp.asarray(valid_BL)
        )
        return routed.loss(), routed

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    grads, routed = run(params)
    taken = X[np.asarray(routed.selected_BL)].astype(np.float64)
    logits = (
        taken / np.sqrt((taken**2).mean(-1, keepdims=True) + 1e-6) @ block.inner.moe.router.w[...]
    )
    odds = np.exp(logits)
    odds /= odds.sum(-1, keepdims=True)
    picks = np.argsort(-odds, axis=-1)[:, :2]
    share = np.bincount(picks.ravel(), minlength=4) / picks.size
    balance = 4 * (share * odds.mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    router = np.mean(routed.own["causal"].losses["predictor"])
    np.testing.assert_allclose(routed.loss(), router + 0.3 * balance + 0.2 * z, rtol=1e-5)
    assert np.abs(grads.inner.moe.router.w[...]).max() > 1e-3
    assert all(isinstance(inner, Inside) for inner in routed.extra[0].values())
    said = statistics({"routed": jax.tree.map(lambda leaf: leaf[None], routed)})
    np.testing.assert_allclose(said["routed/0/rule/moe/balance"], balance, rtol=1e-5)


def test_totals_of_two_halves_make_their_losses_those_of_the_whole():
    block = MoDBlock(WithExperts(nnx.Rngs(1)), WIDTH, CONFIG, rngs=nnx.Rngs(0))
    routed = block(X, jnp.arange(L)[None], jnp.ones((1, L), bool))[1]
    whole = {"routed": jax.tree.map(lambda leaf: leaf[None], routed)}
    halves = [jax.tree.map(lambda leaf, b=b: leaf[:, b : b + 1], whole) for b in range(B)]
    tokens = TokenLoss(jnp.zeros((B, L)))
    few = TokenLoss(tokens.nll_BL[:1])
    sums = jax.tree.map(lambda *parts: sum(parts) / B, *map(totals, halves))
    assert jax.tree.leaves(sums)
    shared = [losses(half, few, sums) for half in halves]
    np.testing.assert_allclose(np.mean(shared), losses(whole, tokens), rtol=1e-5)
    alone = [losses(half, few) for half in halves]
    assert abs(np.mean(alone) - np.mean(shared)) > 1e-3


@pytest.mark.parametrize("routing", ["trained", "predictor"])
def test_anything_but_arrays_and_numbers_beside_x_is_refused_in_one_line(routing):
    with pytest.raises(InputError) as caught:
        returned("a word", routing=routing)
    said = "inner = 'first': must return arrays and numbers beside x, nothing else"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "form, said",
    [
        ("one number", "inner = (2, 6, 1): must return x with the shape (2, 6, 8) that it got"),
        ("too wide", "inner = (2, 6, 16): must return x with the shape (2, 6, 8) that it got"),
        ("a list of names", "must return x with the shape (2, 6, 8) that it got"),
        ("dictionary", "inner = ['aux', 'hidden']: must have the key 'x', for x: see MoDBlock's"),
    ],
)
def test_another_output_is_refused_in_one_line(form, said):
    with pytest.raises(InputError) as caught:
        returned(form)
    assert said in str(caught.value) and "\n" not in str(caught.value)
