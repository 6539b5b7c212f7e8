"""The compiled programs of a run: compiled ahead, so that their time is known apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.data.batches import Batch
from modjax.nn import statistics
from modjax.spec import Execution, RunSpec, TrainConfig
from modjax.training.evaluate import eval_batch_size
from modjax.training.optimizer import make_schedule
from modjax.training.sharding import batch_sharding
from modjax.training.state import (
    Model,
    TrainState,
    abstract_state,
    abstract_weights,
    joined,
    make_init,
)
from modjax.training.step import make_eval_step, make_train_step


class Programs(NamedTuple):
    """What a run calls.

    train_step(state, batch) takes `state` over. eval_steps: by routing, "trained" and, where
    that may look ahead, "causal": functions (weights, batch, index) as make_eval_step's.
    statistics(records) maps metrics["records"] of a train step to scalars.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    eval_steps: dict[str, Callable[[Any, Batch, jax.Array], tuple]]
    statistics: Callable[[Any], dict[str, jax.Array]]


def compile_programs(mesh: Mesh, model: Model, spec: RunSpec, execution: Execution) -> Programs:
    """Compiles what a run needs; call under `jax.set_mesh(mesh)`."""
    train = spec.train
    schedule = make_schedule(train)
    lowered = lower_train_step(mesh, model, train, execution)
    compiled = lowered.compile()
    records = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info[1]["records"],
        compiled.output_shardings[1]["records"],
    )

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
    options = {"layer_loop": "scan", **routing}
    replicated = NamedSharding(mesh, PartitionSpec())
    seed = jnp.int32(train.seed)
    batch = abstract_batch(mesh, eval_batch_size(mesh), train.seq_len)
    eval_step = jax.jit(make_eval_step(model.graphdef, train, **options), out_shardings=replicated)
    weights = joined(*abstract_weights(mesh, model, train))
    compiled = eval_step.lower(weights, batch, seed, seed).compile()
    return lambda weights, batch, index: compiled(weights, batch, seed, index)


def lower_train_step(mesh: Mesh, model: Model, train: TrainConfig, execution: Execution) -> Any:
    """The train step (state, batch, schedule), to be compiled.

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


def init_state(mesh: Mesh, model: Model, train: TrainConfig) -> TrainState:
    """The state before the first step, born sharded; a function of the seed alone."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, model, train))
    init = jax.jit(make_init(model, train), out_shardings=shardings)
    seed = jnp.int32(train.seed)
    # It runs once: on CPU, optimising it costs more time than it saves.
    level = "0" if mesh.devices.flat[0].platform == "cpu" else "3"
    compiled = init.lower(seed).compile({"xla_backend_optimization_level": level})
    return compiled(seed)


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Batch:
    def struct(dtype) -> Any:
        return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=batch_sharding(mesh))

    return Batch(struct(np.int32), struct(np.int32), struct(np.int32), struct(np.float32))
