"""Heads and embeddings: against plain NumPy, in chunks as whole, and on a mesh.

Legend: B batch, L positions, D width, V vocabulary.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from modjax.errors import InputError
from modjax.nn import build
from modjax.nn.layers import ends
from modjax.sharding import partition_spec
from modjax.specs import (
    MLP,
    Execution,
    Logits,
    ModelSpec,
    Tied,
    Tokens,
    canonical,
    from_dict,
    to_dict,
)
from modjax.training.mesh import make_mesh
from modjax.training.step import next_token
from tests.nn.small import QUICK

B, L, D, V = 8, 10, 6, 40
IN_FOUR = 3 * B * V  # chunks of three positions, the last one with two of padding


def spec_of(embed="Tokens()", head="Logits()"):
    return ModelSpec(V, D, 1, 2, 2, 8, MLP(), embed=embed, head=head)


def arguments(dtype="float32"):
    """Returns features, targets, and the weight of each position."""
    rng = np.random.default_rng(0)
    x_BLD = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    return x_BLD, rng.integers(0, V, (B, L)), jnp.asarray(rng.random((B, L)), jnp.float32)


def head_of(spec):
    """Returns a head whose weights are not those of its start."""
    embed, unembed = (
        build(part, spec.shape, rngs=nnx.Rngs(i)) for i, part in enumerate((spec.embed, spec.head))
    )
    return ends.Head(unembed, embed if spec.head.tied else None)


def loss(head, x_BLD, targets_BL, weights_BL):
    model = SimpleNamespace(
        features=lambda inputs_BL: (x_BLD, {}), head=head, config=SimpleNamespace(vocab_size=V)
    )
    batch = SimpleNamespace(inputs_BL=targets_BL, targets_BL=targets_BL)
    nll_BL, _ = next_token(model, batch)
    return jnp.sum(nll_BL * weights_BL), nll_BL


def gradients(head, *args):
    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    (of_head, of_x_BLD), nll_BL = run(head, *args)
    (of_weight,) = jax.tree.leaves(of_head)
    return nll_BL, of_x_BLD, of_weight


def in_numpy(w_DV, softcap, x_BLD, targets_BL, weights_BL):
    """Returns nll, and the gradients of its weighted sum by features and matrix."""
    w_DV, x_BLD, weights_BL = (np.asarray(v, np.float64) for v in (w_DV, x_BLD, weights_BL))
    z_BLV = x_BLD @ w_DV
    capped_BLV = softcap * np.tanh(z_BLV / softcap) if softcap else z_BLV
    p_BLV = np.exp(capped_BLV) / np.exp(capped_BLV).sum(-1, keepdims=True)
    own_BLV = np.eye(V)[targets_BL]
    slope = 1 - np.square(capped_BLV / softcap) if softcap else 1.0
    back_BLV = weights_BL[..., None] * (p_BLV - own_BLV) * slope
    nll_BL = -np.log(np.sum(p_BLV * own_BLV, axis=-1))
    return nll_BL, back_BLV @ w_DV.T, np.einsum("BLD,BLV->DV", x_BLD, back_BLV)


@pytest.mark.parametrize("most", [ends.MOST_NUMBERS, IN_FOUR, 1])
@pytest.mark.parametrize("head", [Logits(), Tied(), Logits(softcap=0.5)])
def test_nll_and_its_gradients_equal_numpy_whole_and_in_chunks(head, most, monkeypatch):
    monkeypatch.setattr(ends, "MOST_NUMBERS", most)
    made, args = head_of(spec_of(head=head)), arguments()
    nll_BL, of_x_BLD, of_weight = gradients(made, *args)
    (weight,) = jax.tree.leaves(made)
    expected = in_numpy(weight.T if head.tied else weight, head.softcap, *args)
    np.testing.assert_allclose(nll_BL, expected[0], rtol=1e-5)
    np.testing.assert_allclose(of_x_BLD, expected[1], atol=1e-5)
    np.testing.assert_allclose(of_weight.T if head.tied else of_weight, expected[2], atol=1e-5)


def test_in_bfloat16_the_chunks_lose_nothing_that_the_whole_keeps(monkeypatch):
    made, args = head_of(spec_of()), arguments("bfloat16")
    whole = gradients(made, *args)
    monkeypatch.setattr(ends, "MOST_NUMBERS", IN_FOUR)
    chunks = gradients(made, *args)
    np.testing.assert_array_equal(chunks[0], whole[0])
    assert chunks[1].dtype == whole[1].dtype == jnp.bfloat16
    exact = in_numpy(jax.tree.leaves(made)[0], None, *args)
    for name, ours, theirs, truth in zip("xw", chunks[1:], whole[1:], exact[1:], strict=True):
        errors = [np.linalg.norm(np.asarray(g, np.float64) - truth) for g in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1] < 0.02 * np.linalg.norm(truth), name


@pytest.mark.parametrize(
    "execution", [Execution(), Execution(data=2, fsdp=2, tensor=2)], ids=["data", "all axes"]
)
@pytest.mark.parametrize("head", [Logits(), Tied()])
def test_on_a_mesh_chunks_move_the_matrix_and_its_gradient_once(execution, head, monkeypatch):
    made, args = head_of(spec_of(head=head)), arguments()
    expected = gradients(made, *args)
    monkeypatch.setattr(ends, "MOST_NUMBERS", IN_FOUR // 8)
    mesh = make_mesh(execution)
    matrix = NamedSharding(
        mesh, partition_spec(("vocab", "embed") if head.tied else ("embed", "vocab"))
    )
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(made, matrix), *jax.device_put(args, rows)
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), out_shardings=None)
        compiled = step.lower(*placed).compile(QUICK)
        (of_head, of_x_BLD), nll_BL = compiled(*placed)
    for ours, theirs in zip((nll_BL, of_x_BLD, *jax.tree.leaves(of_head)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    within, outside = collectives(compiled.as_text())
    assert outside  # the gradient's sum over devices
    # Parts of the vocabulary lie on different devices: sums over it are all that a chunk sends.
    assert bool(within) == (execution.tensor > 1)
    assert all(numbers <= 6 * D < D * V // 2 for numbers in within)


def collectives(text):
    """Returns how many numbers each collective moves, inside loops and outside."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    within, outside, name = [], [], ""
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = found[1]
        if found := re.search(r"= (.*?) (?:all-|reduce-scatter|collective)[\w\-]*\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            (within if name in bodies else outside).append(sum(sizes))
    return within, outside


def test_the_scale_of_the_embedding_is_that_of_gemma():
    tokens_BL = np.random.default_rng(1).integers(0, V, (2, 7))
    shape = spec_of(head=Tied()).shape
    plain, scaled = (build(Tokens(scale), shape, rngs=nnx.Rngs(0)) for scale in (False, True))
    np.testing.assert_array_equal(plain.table[...], scaled.table[...])
    rows_BLD = np.asarray(plain.table[...])[tokens_BL]
    np.testing.assert_array_equal(plain(tokens_BL, jnp.float32), rows_BLD)
    np.testing.assert_allclose(scaled(tokens_BL, jnp.float32), rows_BLD * D**0.5, rtol=1e-6)
    # In bfloat16 the factor is rounded, too.
    half_BLD = scaled(tokens_BL, jnp.bfloat16)
    factor = np.float32(jnp.bfloat16(D**0.5))
    exact_BLD = np.asarray(rows_BLD.astype(jnp.bfloat16), np.float32) * factor
    np.testing.assert_array_equal(half_BLD, exact_BLD.astype(jnp.bfloat16))
    alone = build(Tokens(scale=True), spec_of().shape, rngs=nnx.Rngs(0))
    assert 0.8 < float(jnp.std(alone(np.arange(V)[None], jnp.float32))) < 1.2


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"head": "Logits(softcap=0.0)"}, "Logits.softcap = 0.0: must be greater than 0, or None"),
        ({"head": "Tokens()"}, "model.head = 'Tokens()': must be such as Logits() or Tied()"),
        ({"embed": "Tied()"}, "model.embed = 'Tied()': must be such as Tokens()"),
        ({"embed": None}, "model.embed = 'None': must be such as Tokens()"),
        ({"embed": "Tokens(scale=2)"}, "Tokens.scale = 2: must be of type bool"),
        ({"head": "Logits(), Tied()"}, "must be such as Logits() or Tied()"),
    ],
)
def test_what_is_no_end_is_refused_in_one_line(changes, said):
    with pytest.raises(InputError) as caught:
        spec_of(**changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_ends_are_read_from_text_and_name_a_run_only_where_they_are_not_the_default():
    spec = spec_of("Tokens(scale=True)", "Tied(softcap=30)")
    assert (spec.embed, spec.head) == (Tokens(scale=True), Tied(softcap=30.0))
    assert to_dict(spec)["head"] == "Tied(softcap=30.0)"
    assert from_dict(ModelSpec, to_dict(spec)) == spec
    assert {"embed", "head"} <= canonical(spec).keys()
    assert not {"embed", "head"} & canonical(spec_of()).keys()
