"""Compiled programs of a run. They are compiled ahead, to time compilation separately."""

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
    """Compiled functions of a run.

    train_step: maps (state, batch) to (state, metrics), and donates the state.
    eval_steps: results of `compile_eval_step` by routing: "trained", and "causal" for a model that
      then selects by another rule.
    statistics: maps the records of a train step's metrics to scalars.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    eval_steps: dict[str, Callable[[Any, Batch, jax.Array], tuple]]
    statistics: Callable[[Any], dict[str, jax.Array]]


def compile_programs(mesh: Mesh, model: Model, spec: RunSpec, compiled: Any) -> Programs:
    """Returns the compiled programs of a run. Call it under `jax.set_mesh(mesh)`.

    compiled: the compiled result of `lower_train_step`.
    """
    train, schedule = spec.train, make_schedule(spec.train)
    shapes, shardings = compiled.out_info[1]["records"], compiled.output_shardings[1]["records"]
    records = jax.tree.map(struct, shapes, shardings)

    def scalars(records: Any) -> dict[str, jax.Array]:
        return statistics(records, jnp.ones((train.batch_size, train.seq_len), bool))

    routings = dict.fromkeys(("trained", spec.model.causal_routing() or "trained"))
    return Programs(
        lambda state, batch: compiled(state, batch, schedule),
        {name: compile_eval_step(mesh, model, train, routing=name) for name in routings},
        jax.jit(scalars).lower(records).compile() if records else dict,
    )


def compile_eval_step(
    mesh: Mesh, model: Model, train: TrainConfig, *, layer_loop: str = "scan", **routing: Any
) -> Callable:
    """Returns the function (weights, batch, index) of `make_eval_step` for the run's seed.

    layer_loop: by default, layers are scanned: a few evaluations save less than unrolled layers
      cost to compile.
    """
    step = make_eval_step(model.graphdef, train, layer_loop=layer_loop, **routing)
    seed, weights = jnp.int32(train.seed), joined(*abstract_weights(mesh, model))
    batch = abstract_batch(mesh, eval_batch_size(mesh), train.seq_len)
    jitted = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
    compiled = jitted.lower(weights, batch, seed, seed).compile()
    return lambda weights, batch, index: compiled(weights, batch, seed, index)


def lower_train_step(mesh: Mesh, model: Model, train: TrainConfig, execution: Execution) -> Any:
    """Returns the lowered train step (state, batch, schedule).

    Outside `jax.set_mesh`, the mesh may consist of devices that are not there, such as those of a
    TPU topology. `execution.remat` = "auto" counts as "none", see fitting.py.
    """
    # Under `jax.set_mesh`, their small arrays would be made on devices that may not exist.
    state, schedule = abstract_state(mesh, model, train), make_schedule(train)
    remat = execution.settled().remat
    step = jax.jit(
        make_train_step(model, train, layer_loop=execution.layer_loop, remat=remat),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(mesh, train.batch_size, train.seq_len), schedule)


def init_state(mesh: Mesh, model: Model, train: TrainConfig, weights: Any = None) -> TrainState:
    """Returns the state before the first step, created sharded. weights: see `make_init`."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, model, train))
    init = jax.jit(make_init(model, train), out_shardings=shardings)
    arguments = jnp.int32(train.seed), weights
    # It runs once: on CPU, optimising it costs more time than it saves.
    level = "0" if mesh.devices.flat[0].platform == "cpu" else "3"
    return init.lower(*arguments).compile({"xla_backend_optimization_level": level})(*arguments)


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Batch:
    shape, sharding = (batch_size, seq_len), batch_sharding(mesh)
    ids: Any = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    weights: Any = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    return Batch(ids, ids, ids, weights)
