"""In other people's models and on their meshes, top-k stays within a shard of the batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import modjax
from modjax.sharding import per_sequence
from modjax.specs import Binary, TopK


class Double(nnx.Module):
    def __call__(self, x_BLD):
        return 2 * x_BLD


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("rule", [TopK(), Binary()])
def test_a_routed_block_adds_no_collective_on_a_mesh_with_other_axes(rule, is_set):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("x", "y")))
    config = modjax.MoDConfig(capacity=0.25, rule=rule)
    block = modjax.MoDBlock(Double(), 8, config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (16, 32, 8))
    run = jax.jit(lambda x: block(x)[0], out_shardings=rows)
    expected = block(x)[0]
    with jax.set_mesh(mesh) if is_set else jax.default_matmul_precision("float32"):
        compiled = run.lower(jax.device_put(x, rows)).compile()
        np.testing.assert_allclose(compiled(jax.device_put(x, rows)), expected, rtol=1e-6)
    found = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    assert found == []


def test_what_runs_row_by_row_can_be_mapped_and_scanned():
    x = jax.random.normal(jax.random.key(0), (3, 4, 10))

    def best(x_BL):
        return per_sequence(lambda x_BL: jax.lax.top_k(x_BL, 2)[1], x_BL)

    expected = jax.lax.top_k(x, 2)[1]
    np.testing.assert_array_equal(jax.vmap(best)(x), expected)
    np.testing.assert_array_equal(jax.lax.map(best, x), expected)

    def weighed(x):
        return jnp.sum(x) * jnp.sum(best(jax.lax.stop_gradient(x))).astype(x.dtype)

    gradient = jax.grad(weighed)(x[0])
    np.testing.assert_array_equal(gradient, np.full_like(x[0], expected[0].sum()))
