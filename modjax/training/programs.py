"""The compiled programs of a run: compiled ahead, so that their time is known apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.data.batches import Batch
from modjax.nn import statistics
from modjax.specs import Execution, RunSpec, TrainConfig
from modjax.training.mesh import batch_sharding
from modjax.training.optimizer import make_schedule
from modjax.training.results.evaluate import eval_batch_size
from modjax.training.state import (
    Model,
    TrainState,
    abstract_state,
    abstract_weights,
    joined,
    make_init,
    struct,
)
from modjax.training.step import make_eval_step, make_train_step


class Programs(NamedTuple):
    """The compiled functions of a run.

    train_step(state, batch) donates `state`.
    eval_steps: see compile_eval_step; by routing, "trained" and, where that may look ahead,
      "causal".
    statistics(records) maps metrics["records"] of a train step to scalars.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    eval_steps: dict[str, Callable[[Any, Batch, jax.Array], tuple]]
    statistics: Callable[[Any], dict[str, jax.Array]]


def compile_programs(mesh: Mesh, model: Model, spec: RunSpec, execution: Execution) -> Programs:
    """Compiles what a run needs; call under `jax.set_mesh(mesh)`."""
    train, schedule = spec.train, make_schedule(spec.train)
    lowered = lower_train_step(mesh, model, train, execution)
    compiled = lowered.compile()
    shapes, shardings = lowered.out_info[1]["records"], compiled.output_shardings[1]["records"]
    records = jax.tree.map(struct, shapes, shardings)

    def described(records: Any) -> dict[str, jax.Array]:
        return statistics(records, jnp.ones((train.batch_size, train.seq_len), bool))

    routings = dict.fromkeys(("trained", spec.model.causal_routing() or "trained"))
    return Programs(
        lambda state, batch: compiled(state, batch, schedule),
        {name: compile_eval_step(mesh, model, train, routing=name) for name in routings},
        jax.jit(described).lower(records).compile() if records else dict,
    )


def compile_eval_step(mesh: Mesh, model: Model, train: TrainConfig, **routing: Any) -> Callable:
    """Returns a function (weights, batch, index), as make_eval_step's for the run's seed.

    Its layers are scanned: that compiles in less time than unrolled ones save in a few evaluations.
    """
    step = make_eval_step(model.graphdef, train, layer_loop="scan", **routing)
    seed, weights = jnp.int32(train.seed), joined(*abstract_weights(mesh, model))
    batch = abstract_batch(mesh, eval_batch_size(mesh), train.seq_len)
    jitted = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
    compiled = jitted.lower(weights, batch, seed, seed).compile()
    return lambda weights, batch, index: compiled(weights, batch, seed, index)


def lower_train_step(mesh: Mesh, model: Model, train: TrainConfig, execution: Execution) -> Any:
    """Returns the train step (state, batch, schedule), to be compiled.

    Outside `jax.set_mesh` it may be for devices that are not there, as of a TPU topology.
    """
    # Both make small arrays, on the devices of a mesh that is set.
    state, schedule = abstract_state(mesh, model, train), make_schedule(train)
    step = jax.jit(
        make_train_step(model, train, layer_loop=execution.layer_loop, remat=execution.remat),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(mesh, train.batch_size, train.seq_len), schedule)


def init_state(mesh: Mesh, model: Model, train: TrainConfig, weights: Any = None) -> TrainState:
    """Returns the state before the first step, born sharded; see make_init for its weights."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, model, train))
    init = jax.jit(make_init(model, train), out_shardings=shardings)
    arguments = jnp.int32(train.seed), weights
    # It runs once: on CPU, optimising it costs more time than it saves.
    level = "0" if mesh.devices.flat[0].platform == "cpu" else "3"
    return init.lower(*arguments).compile({"xla_backend_optimization_level": level})(*arguments)


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Batch:
    shape, sharding = (batch_size, seq_len), batch_sharding(mesh)
    dtypes = (np.int32, np.int32, np.int32, np.float32)
    arrays: Any = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes]
    return Batch(*arrays)
