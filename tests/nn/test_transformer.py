"""The decoder: loops, rematerialisation, causality, segments, sizes, and use by others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from modjax import flops
from modjax.nn import At, Call, MoDBlock, Transformer
from modjax.nn.layers.attention import rotary_tables
from modjax.specs import Dense, Logits, MoD, MoDConfig, ModelSpec, Random, Rope, Tied
from modjax.specs.run import KEPT
from tests.nn.small import QUICK, build

ROUTED = MoD(Dense(), capacity=0.25)
CONFIG = ModelSpec(40, 16, 4, 4, 2, 32, layers=(Dense(), ROUTED))
TOKENS = jax.random.randint(jax.random.key(7), (3, 24), 0, 40)


DENSE = dataclasses.replace(CONFIG, layers=(Dense(),))


def forward(config, *args):
    graphdef, params = build(config)
    run = jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args), compiler_options=QUICK)
    return run(params, *args)


def loss_and_grads(config=CONFIG, **options):
    graphdef, params = build(config)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return jnp.mean(jnp.square(model(TOKENS, key=jax.random.key(0), **options)[0]))

    return jax.value_and_grad(loss), params


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(
    "layers",
    [
        (Dense(),),
        (Dense(), ROUTED),
        (dataclasses.replace(ROUTED, rule=Random()), Dense()),
    ],
)
def test_scan_equals_unrolled_in_values_and_gradients(layers):
    config = dataclasses.replace(CONFIG, layers=layers)
    results = []
    for layer_loop in ("scan", "unroll"):
        f, params = loss_and_grads(config, layer_loop=layer_loop)
        results.append(jax.jit(f, compiler_options=QUICK)(params))
        jaxpr = str(jax.make_jaxpr(f)(params))
        assert (" scan[" in jaxpr) == (layer_loop == "scan")
    assert_same(*results)


def test_a_pattern_of_twelve_runs_its_blocks_in_order():
    config = dataclasses.replace(CONFIG, num_layers=12, layers=(Dense(),) * 12)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    tokens = TOKENS[:1, :6]
    quick = {"xla_backend_optimization_level": "0"}
    forward = jax.jit(lambda p: nnx.merge(graphdef, p)(tokens)[0], compiler_options=quick)

    dense = nnx.split(model.stack.blocks["0_seq"])[0]
    positions = jnp.arange(6)[None]
    ropes = {"Rope()": rotary_tables(positions, Rope(), config.shape.head_dim, 8, jnp.float32)}
    at = At(positions, None, None, ropes, {})
    one_block = jax.jit(lambda p, x: nnx.merge(dense, p)(x, at, Call()).x)
    x_BLD = params["embed"]["table"][...][tokens]
    for i in range(12):
        block = params["stack"]["blocks"][f"{i}_seq"]
        x_BLD = one_block(jax.tree.map(lambda leaf: leaf[0], block), x_BLD)
    by_hand = nnx.merge(graphdef, params).final_norm(x_BLD) @ params["unembed"]["w_logits"][...]
    np.testing.assert_allclose(forward(params), by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
@pytest.mark.parametrize("remat", ["queries,keys,values,context,hidden", "full"])
def test_rematerialisation_changes_what_is_kept_and_nothing_else(layer_loop, remat):
    plain, params = loss_and_grads(layer_loop=layer_loop)
    saving, _ = loss_and_grads(layer_loop=layer_loop, remat=remat)
    assert "remat" not in str(jax.make_jaxpr(plain)(params))
    assert "remat" in str(jax.make_jaxpr(saving)(params))
    assert_same(*(jax.jit(f, compiler_options=QUICK)(params) for f in (plain, saving)))


def test_every_activation_that_remat_names_is_kept_and_saves_its_products():
    products = {}
    for remat in ("full", *KEPT):
        f, params = loss_and_grads(DENSE, layer_loop="scan", remat=remat)
        products[remat] = str(jax.make_jaxpr(f)(params)).count("dot_general")
    # The backward pass recomputes a layer's products of queries, keys, values, scores, context,
    # and of the MLP's first matrix. The last needs no product of the second matrix.
    less = {name: products["full"] - products[name] for name in KEPT}
    assert less == {"queries": 1, "keys": 1, "values": 1, "context": 1, "hidden": 1}


def test_dense_model_is_causal_by_perturbation_and_by_gradient():
    edited = TOKENS.at[:, 10].set((TOKENS[:, 10] + 1) % 40)
    before, after = forward(DENSE, TOKENS)[0], forward(DENSE, edited)[0]
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.all(np.any(np.asarray(before[:, 10:] != after[:, 10:]), axis=-1))

    graphdef, params = build(DENSE)
    distinct = jnp.arange(24)[None]
    logits_at_9 = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(distinct)[0][0, 9].sum()))
    touched = np.abs(np.asarray(logits_at_9(params)["embed"]["table"][...])).sum(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(10))


def test_packed_documents_are_read_as_if_alone():
    segments = jnp.repeat(jnp.array([[1, 2, 0]]), 8, axis=1)
    packed = forward(DENSE, TOKENS[:1], segments)[0]
    for start in (0, 8):
        alone = forward(DENSE, TOKENS[:1, start : start + 8])[0]
        np.testing.assert_allclose(packed[:, start : start + 8], alone, rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_the_routing_of_real_tokens():
    segments = jnp.where(jnp.arange(24)[None] < 4, 1, 0) * jnp.ones((3, 1), jnp.int32)
    config = dataclasses.replace(CONFIG, layers=(ROUTED,))
    selected = np.asarray(forward(config, TOKENS, segments)[1]["0_mod"].selected_BL)
    alone = np.asarray(forward(config, TOKENS[:, :4])[1]["0_mod"].selected_BL)
    assert alone.any() and not selected[..., 4:].any()
    np.testing.assert_array_equal(selected[..., :4], alone)


@pytest.mark.parametrize("mlp", ["gelu", "silu", "relu2", "geglu", "swiglu"])
@pytest.mark.parametrize("head", [Logits(), Tied()])
def test_parameters_are_counted_without_building_the_model(mlp, head):
    layers = (Dense(mlp), MoD(Dense(mlp), capacity=0.25))
    config = dataclasses.replace(CONFIG, layers=layers, head=head)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == flops.parameters(config)["total"]


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    config = dataclasses.replace(DENSE, dtype="bfloat16")
    graphdef, params = build(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = forward(config, TOKENS)[0]
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(logits - forward(DENSE, TOKENS)[0])))
    jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(TOKENS)[0])(params)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in products)


def test_logits_start_near_unit_scale_tied_or_not():
    for head in (Logits(), Tied()):
        logits = forward(dataclasses.replace(CONFIG, head=head), TOKENS)[0]
        assert 0.5 < float(jnp.std(logits)) < 2


class TheirBlock(nnx.Module):
    """Foreign block that takes positions and knows nothing of modjax."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x_BLD, positions_BL):
        return x_BLD + self.linear(x_BLD) * jnp.cos(positions_BL.astype(jnp.float32))[..., None]


def their_block(rngs):
    return MoDBlock(TheirBlock(rngs), 16, MoDConfig(capacity=0.5), rngs=rngs)


def test_mod_wraps_the_block_of_another_nnx_model():
    block = their_block(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    y, record = block(x, jnp.arange(8)[None])
    b, i = np.argwhere(record.selected_BL)[3]
    r = float(x[b, i] @ block.router.w[..., 0])
    update = block.inner.linear(x[b, i]) * np.cos(np.float32(i))
    np.testing.assert_allclose(y[b, i], x[b, i] + r * update, rtol=1e-5, atol=1e-6)


def test_mod_works_in_a_linen_model_through_the_bridge():
    class TheirModel(linen.Module):
        @linen.compact
        def __call__(self, x_BLD):
            block = bridge.to_linen(their_block, name="routed")
            y_BLD, _ = block(x_BLD, jnp.arange(x_BLD.shape[1])[None])
            return linen.Dense(4)(y_BLD)

    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    # The bridge boxes parameters with their sharding, as linen.with_partitioning does.
    variables = linen.unbox(TheirModel().init(jax.random.key(1), x))
    assert variables["params"]["routed"]["router"]["w"].shape == (16, 1)
    grads = jax.grad(lambda v: jnp.sum(jnp.sin(TheirModel().apply(v, x))))(variables)
    assert float(jnp.abs(grads["params"]["routed"]["router"]["w"]).max()) > 0


@pytest.mark.parametrize("attention", ["qk_norm='head', bias='qkv'", "qk_norm='all', bias='all'"])
@pytest.mark.parametrize("mlp", ["MLP(bias=True)", "MLP('swiglu', bias=True)"])
def test_norms_of_heads_and_biases_are_counted(attention, mlp):
    config = dataclasses.replace(CONFIG, layers=f"Seq(Attention({attention}), {mlp})")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == flops.parameters(config)["total"]
