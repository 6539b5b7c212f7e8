"""A row computes the same alone as padded: capacity is a share of its own positions.

Legend: B batch, L positions, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import MoDBlock, losses
from modjax.nn.routing.selection import of_valid
from modjax.specs import (
    Attention,
    Dense,
    ExpertChoice,
    ExpertThreshold,
    MoD,
    MoDConfig,
    ModelSpec,
    MoE,
    Predictor,
    Seq,
    TokenChoice,
    selected_tokens,
)
from tests.nn.small import QUICK, WIDTH, Mixer, behind_a_block, random_model

SHORT, LONG = 10, 32
LEARNED = {"capacity": 0.25, "causal": Predictor()}


def block(*rule, **options):
    return Seq(Attention(), MoE(4, *rule, **options))


KINDS = {
    "MoD by ranks": behind_a_block(
        "received",
        "expert_choice",
        "stochastic",
        "learned_position",
        auxiliary=0.5,
        **LEARNED,
    ),
    "MoD by rules": behind_a_block("positional", "binary", "threshold", **LEARNED),
    "MoD in MoD": (Dense(), MoD(MoD(Dense(), capacity=0.5), capacity=0.4)),
    "experts": (
        block(capacity_factor=0.75),
        block(TokenChoice(2, no_ops=2), capacity_factor=1.0),
        block(ExpertChoice(), capacity_factor=1.0),
        block(ExpertThreshold(2), capacity_factor=0.5),
    ),
    "staged": (
        block(capacity_factor=1.0),
        MoD(block(capacity_factor=0.75), capacity=0.5),
        MoD(block(ExpertChoice(), capacity_factor=1.0), capacity=0.5),
    ),
}
CASES = (
    ("MoD by ranks", "trained"),
    ("MoD by rules", "trained"),
    pytest.param("MoD in MoD", "threshold", marks=pytest.mark.slow),
    ("experts", "trained"),
    pytest.param("MoD by rules", "threshold", marks=pytest.mark.slow),
    pytest.param("MoD by ranks", "predictor", marks=pytest.mark.slow),
    pytest.param("MoD by ranks", "paced", marks=pytest.mark.slow),
    pytest.param("MoD in MoD", "trained", marks=pytest.mark.slow),
    pytest.param("staged", "trained", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("kind, routing", CASES)
def test_a_row_computes_the_same_however_far_it_is_padded(kind, routing):
    layers = KINDS[kind]
    graphdef, params = random_model(ModelSpec(40, 8, len(layers), 2, 1, 16, layers=layers))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (2, LONG))
    segments = (np.arange(LONG) < np.array([[SHORT], [LONG]])).astype(int)

    def loss(params, tokens, segments):
        logits, records = nnx.merge(graphdef, params)(
            tokens, segments, key=jax.random.key(0), routing=routing
        )
        row = logits[0, :SHORT]
        nll = jax.nn.logsumexp(logits, axis=-1)
        own = jax.tree.map(lambda leaf: leaf[:, :1], records)
        return jnp.sum(jnp.sin(row)) + losses(own, nll[:1]), (row, records)

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    grads, (alone, _) = run(params, tokens[:1, :SHORT], None)
    padded_grads, (padded, records) = run(params, tokens, segments)
    np.testing.assert_allclose(padded, alone, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(padded_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    # The share is of the row's own positions, whoever decides.
    for record in records.values():
        k_B = getattr(record, "k_B", None)
        if k_B is not None:
            capacity = 0.4 if kind == "MoD in MoD" else 0.25 if "MoD" in kind else 0.5
            assert k_B[0].tolist() == [selected_tokens(capacity, n) for n in (SHORT, LONG)]


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_a_block_of_ones_own_takes_its_share_of_the_valid_positions(length):
    rngs = nnx.Rngs(0)
    mod = MoDBlock(Mixer(rngs), WIDTH, MoDConfig(capacity=0.25), rngs=rngs)
    x = jax.random.normal(jax.random.key(0), (2, LONG, WIDTH))
    valid = jnp.arange(LONG)[None] < jnp.array([[length], [0]])
    y, record = mod(x, valid_BL=valid)
    alone, own = mod(x[:1, :length])
    np.testing.assert_array_equal(record.selected_BL[0, :length], own.selected_BL[0])
    assert record.selected_BL.sum(axis=1).tolist() == [selected_tokens(0.25, length), 0]
    np.testing.assert_allclose(y[0, :length], alone[0], rtol=1e-5, atol=1e-5)


def test_shares_are_rounded_as_python_rounds_them():
    number = MoE(3, TokenChoice(2), capacity_factor=1.1).slots
    valid = jnp.arange(LONG)[None] < jnp.arange(LONG + 1)[:, None]
    got = of_valid(number, valid, LONG + 1, LONG)
    assert got.tolist() == [0, *(number(n) for n in range(1, LONG + 1))]
    assert of_valid(number, None, 2, LONG).tolist() == [number(LONG)] * 2
