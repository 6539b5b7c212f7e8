"""The compiled programs of a run: compiled ahead, so that their time is known apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.config import TrainConfig
from modjax.data.batches import Batch
from modjax.nn import routing_statistics
from modjax.training.optimizer import make_optimizer
from modjax.training.sharding import batch_sharding
from modjax.training.state import Model, TrainState, abstract_state, make_init
from modjax.training.step import make_eval_step, make_train_step


class Programs(NamedTuple):
    """train_step(state, batch) takes `state` over; eval_step(params, batch, index);
    router_statistics(aux) maps metrics["aux"] of a train step to scalars.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    eval_step: Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]
    router_statistics: Callable[[Any], dict[str, jax.Array]]


def compile_programs(mesh: Mesh, model: Model, train: TrainConfig) -> Programs:
    """Compiles what every run needs; call under `jax.set_mesh(mesh)`."""
    replicated = NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(train, model.logical_axes)
    state = abstract_state(mesh, model, optimizer)
    train_step = jax.jit(
        make_train_step(model.graphdef, optimizer, train),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    ).lower(state, abstract_batch(mesh, train.batch_size, train.seq_len))
    compiled_train_step = train_step.compile()
    aux = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        train_step.out_info[1]["aux"],
        compiled_train_step.output_shardings[1]["aux"],
    )
    eval_batch = abstract_batch(mesh, eval_batch_size(train), train.seq_len)
    eval_step = jax.jit(make_eval_step(model.graphdef, train), out_shardings=replicated)
    return Programs(
        compiled_train_step,
        eval_step.lower(state.params, eval_batch, jnp.int32(0)).compile(),
        jax.jit(routing_statistics).lower(aux).compile() if aux else routing_statistics,
    )


def init_state(mesh: Mesh, model: Model, train: TrainConfig) -> TrainState:
    """The state before the first step, born sharded; a function of the seed alone."""
    optimizer = make_optimizer(train, model.logical_axes)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, model, optimizer))
    init = jax.jit(make_init(model, optimizer), out_shardings=shardings)
    seed = jnp.int32(train.seed)
    # It runs once: on CPU, optimising it costs more time than it saves.
    level = "0" if jax.default_backend() == "cpu" else "3"
    compiled = init.lower(seed).compile({"xla_backend_optimization_level": level})
    return compiled(seed)


def eval_batch_size(train: TrainConfig) -> int:
    """As many sequences as one forward pass of training."""
    return train.batch_size // train.accumulation


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int) -> Batch:
    def struct(dtype) -> Any:
        return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=batch_sharding(mesh))

    return Batch(struct(np.int32), struct(np.int32), struct(np.int32), struct(np.float32))
