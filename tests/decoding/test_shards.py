"""On a mesh, decoding moves no row, no cache entry and no weight between shards of the batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import modjax
from modjax.sharding import LOGICAL_TO_MESH
from modjax.specs import Dense, Execution, MoD, ModelSpec, Predictor
from modjax.training.mesh import make_mesh

SPEC = ModelSpec(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    d_ff=64,
    layers=(MoD(Dense(), capacity=0.5, causal=Predictor()),),
)
TOKENS = np.random.default_rng(0).integers(0, 64, (16, 10)).astype(np.int32)


@pytest.mark.parametrize("new", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_only_the_number_of_routed_rows_is_shared(new):
    graphdef, params = nnx.split(modjax.Transformer(SPEC, rngs=nnx.Rngs(0)))

    def read(params, tokens, cache):
        reader = nnx.merge(graphdef, params).reader(max_length=12, routing="predictor")
        return reader(tokens, jnp.full(16, tokens.shape[1]), cache)

    prompt, turn = TOKENS[:, :8], TOKENS[:, 8 : 8 + new]
    _, cache, _ = jax.jit(read)(params, prompt, None)
    expected, _, depths = jax.jit(read)(params, turn, cache)
    mesh = make_mesh(Execution(data=2, fsdp=2, expert=2))
    rows = NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))
    with jax.set_mesh(mesh):
        placed = jax.device_put((turn, cache), rows)
        compiled = jax.jit(read).lower(params, *placed).compile()
        got, _, took = compiled(params, *placed)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(took, depths)
    collectives = "all-gather|all-reduce|all-to-all|collective-permute"
    found = re.findall(rf"= (\S+) ({collectives})\(", compiled.as_text())
    assert set(found) <= {("s32[]", "all-reduce")}
