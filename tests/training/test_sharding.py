"""Meshes of 8 fake devices: same numbers, expected places, and no communication by routing.

`python -m tests.training.test_sharding` writes partition_specs.json anew.
"""

import collections
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from modjax.errors import InputError
from modjax.nn import Routed
from modjax.sharding import (
    LOGICAL_TO_MESH,
    MESH_AXES,
    constrain,
    partition_spec,
    per_sequence,
)
from modjax.specs import Binary, Dense, Execution, MoD, Predictor, Random, TopK
from modjax.training.mesh import check_batch, make_mesh, put_batch
from modjax.training.optimizer import make_schedule
from modjax.training.programs import abstract_batch, init_state
from modjax.training.state import abstract_model, abstract_state, abstract_weights, joined
from modjax.training.step import make_train_step
from tests.training.tiny import (
    QUICK,
    initial_state,
    model,
    one_device_step,
    random_batch,
    train_config,
)

SPECS = Path(__file__).with_name("partition_specs.json")
CUBE = Execution(data=2, fsdp=2, tensor=2)
SWIGLU = Dense("swiglu")
# Every kind of layer and of parameter.
EVERYTHING = model(
    layers=(
        SWIGLU,
        *(MoD(SWIGLU, rule=rule, causal=Predictor()) for rule in (TopK(), Random(), Binary())),
    ),
    num_layers=4,
)


def partition_specs() -> dict[str, list]:
    """Returns the partition spec of every parameter and measured number."""
    split = abstract_model(EVERYTHING)
    state = abstract_state(make_mesh(CUBE), split, train_config())
    leaves = jax.tree_util.tree_leaves_with_path(joined(state.params, state.measured))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.sharding.spec)
        for path, leaf in leaves
    }


def compile_step(model_config, train, execution):
    split = abstract_model(model_config)
    mesh = make_mesh(execution)
    state = abstract_state(mesh, split, train)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(split, train)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        batch = abstract_batch(mesh, train.batch_size, train.seq_len)
        lowered = jitted.lower(state, batch, make_schedule(train))
        return lowered.compile(QUICK), split, mesh


def test_every_parameter_lies_where_the_stored_table_says():
    assert partition_specs() == json.loads(SPECS.read_text())


def test_moments_lie_where_their_parameters_do():
    split = abstract_model(EVERYTHING)
    state = abstract_state(make_mesh(CUBE), split, train_config())
    shardings = collections.Counter(leaf.sharding.spec for leaf in jax.tree.leaves(state.params))
    moments = collections.Counter(
        leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 0
    )
    assert moments == {spec: 2 * count for spec, count in shardings.items()}


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_2x2x2_gives_the_loss_and_gradients_of_one_device(accumulation):
    # Without clipping or decay, the first moment after one step is 1 - b1 = 1 times the gradient.
    train = train_config(b1=0.0, clip_norm=1e9, accumulation=accumulation)
    config = model(num_kv_heads=2, layers=(SWIGLU, MoD(SWIGLU, capacity=0.25)))
    batch = random_batch(0, 8, 32)
    compiled, split, mesh = compile_step(config, train, CUBE)
    with jax.set_mesh(mesh):
        state = init_state(mesh, split, train)
        # Copied before the step takes the buffers over.
        params = jax.tree.map(np.array, state.params)
        sharded, metrics = compiled(state, put_batch(batch, mesh), make_schedule(train))
    start = initial_state(config)
    jax.tree.map(np.testing.assert_allclose, params, start.params)
    single, expected = one_device_step(config, train)(start, batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
    assert float(expected["grad_norm"]) > 0.1
    for ours, reference in zip(
        jax.tree.leaves(sharded.opt_state), jax.tree.leaves(single.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, reference, atol=1e-5)
    assert expected["records"]
    routed = {name: r for name, r in expected["records"].items() if isinstance(r, Routed)}
    assert routed
    for name, record in routed.items():
        np.testing.assert_array_equal(metrics["records"][name].selected_BL, record.selected_BL)


def collectives(model_config, execution) -> collections.Counter:
    """Returns the number of collectives of each kind in the compiled train step."""
    # More selected tokens on a device than the model is wide: with fewer, the partitioner would
    # rather move activations than parameters, in dense models too.
    compiled, _, _ = compile_step(model_config, train_config(seq_len=128), execution)
    return count_collectives(compiled)


def count_collectives(compiled) -> collections.Counter:
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize(
    "execution",
    [Execution(), pytest.param(Execution(data=2, fsdp=4), marks=pytest.mark.slow), CUBE],
)
def test_routing_adds_no_collective(execution):
    dense = collectives(model(layers=(Dense(), Dense())), execution)
    assert dense["all-reduce"] > 0
    assert collectives(model(), execution) == dense


def test_constrain_refuses_a_tensor_of_another_rank():
    with pytest.raises(ValueError, match="2 dims"):
        constrain(jnp.zeros((2, 3, 4)), "batch", "length")


def test_constrain_and_per_sequence_leave_foreign_meshes_alone():
    x_BL = jnp.arange(6.0).reshape(2, 3)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(constrain(x_BL, "batch", "length"), x_BL)
        np.testing.assert_array_equal(per_sequence(jnp.negative, x_BL), -x_BL)


def test_per_sequence_takes_functions_that_return_any_rank():
    x_BL = np.random.default_rng(0).normal(0, 1, (8, 5)).astype(np.float32)
    with jax.set_mesh(make_mesh(CUBE)):
        number_B = jax.jit(lambda x_BL: per_sequence(lambda x_BL: jnp.max(x_BL, axis=1), x_BL))
        cube_BLL = jax.jit(lambda x_BL: per_sequence(lambda x_BL: x_BL[:, None] > 0, x_BL))
        np.testing.assert_array_equal(number_B(x_BL), x_BL.max(axis=1))
        np.testing.assert_array_equal(cube_BLL(x_BL), x_BL[:, None] > 0)


@pytest.mark.parametrize(
    ("execution", "named"),
    [
        (Execution(fsdp=3), "execution.fsdp"),
        (Execution(data=4, tensor=4), "execution.data"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(execution, named):
    with pytest.raises(InputError, match=named):
        make_mesh(execution)


def test_a_batch_that_does_not_fit_the_mesh_is_refused():
    mesh = make_mesh(CUBE)
    check_batch(mesh, train_config(batch_size=8, accumulation=2))
    with pytest.raises(InputError, match=r"train.batch_size = 6.*multiple of 4"):
        check_batch(mesh, train_config(batch_size=6))
    with pytest.raises(InputError, match=r"train.batch_size = 8.*multiple of 16"):
        check_batch(mesh, train_config(batch_size=8, accumulation=4))


def test_a_parameter_that_does_not_split_evenly_is_refused():
    split = abstract_model(model(num_kv_heads=1))
    with pytest.raises(InputError, match=r"execution.tensor = 2.*kv_heads"):
        abstract_weights(make_mesh(CUBE), split)


def test_every_logical_axis_maps_to_axes_of_the_mesh():
    mesh = AbstractMesh((2, 2, 2, 1), MESH_AXES)
    for name in LOGICAL_TO_MESH:
        jax.sharding.NamedSharding(mesh, partition_spec((name,)))
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp", "expert"), None)


if __name__ == "__main__":
    SPECS.write_text(json.dumps(partition_specs(), indent=1) + "\n")
