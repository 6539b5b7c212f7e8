"""The train step of the paper's models compiles for TPUs, by the TPU compiler and without a TPU."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from modjax.nn.sharding import MESH_AXES
from modjax.spec import Dense, Execution, MoD, ModelSpec, TrainConfig
from modjax.training.optimizer import make_schedule
from modjax.training.programs import abstract_batch
from modjax.training.state import abstract_model, abstract_state
from modjax.training.step import make_train_step
from tests.training.test_sharding import count_collectives

# 220M, the size of the paper's Figure 3; the batch of one slice of 16 chips.
DENSE = ModelSpec(32_128, 1024, 16, 8, 8, 4096, dtype="bfloat16")
TRAIN = TrainConfig(128, 2048, 1000, 1e-3, 20)
EXECUTION = Execution(data=4, fsdp=4, layer_loop="scan", remat="dots")


def compile_for_tpu(config: ModelSpec):
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc("v5e:4x4", platform="tpu")
    sizes = (EXECUTION.data, EXECUTION.fsdp, 1, 1)
    devices = np.array(topology.devices).reshape(sizes)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    model = abstract_model(config, EXECUTION)
    state = abstract_state(mesh, model, TRAIN)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(model, TRAIN)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        batch = abstract_batch(mesh, TRAIN.batch_size, TRAIN.seq_len)
        schedule = jax.eval_shape(lambda: make_schedule(TRAIN))
        return jitted.lower(state, batch, schedule).compile()


@pytest.mark.slow
def test_routing_adds_no_collective_and_no_memory_on_a_tpu_slice():
    dense = compile_for_tpu(DENSE)
    mod = compile_for_tpu(dataclasses.replace(DENSE, layers=(Dense(), MoD())))
    assert set(count_collectives(mod)) <= set(count_collectives(dense))
    used, budget = (
        c.memory_analysis().temp_size_in_bytes + c.memory_analysis().argument_size_in_bytes
        for c in (mod, dense)
    )
    assert used <= budget < 16e9  # of a v5e chip
