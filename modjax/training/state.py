"""What training carries from step to step, and how it is created on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.config import Execution, ModelConfig, TrainConfig
from modjax.nn import Transformer
from modjax.training.optimizer import make_optimizer, make_schedule
from modjax.training.sharding import param_shardings


class TrainState(NamedTuple):
    """params: nested dict of float32 arrays. step: updates made so far, int32.

    diverged_step: the first step whose loss or gradient was not finite, 0 while there is none.
    loss_sum, loss_steps: of the losses since the last line of metrics, so that a line can tell
      their mean without the host waiting for each.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    diverged_step: jax.Array
    loss_sum: jax.Array
    loss_steps: jax.Array


class Model(NamedTuple):
    """A model without its arrays: graph definition, and shapes and logical axes of parameters."""

    graphdef: Any
    params: Any
    logical_axes: Any
    init: Callable[[jax.Array], Any]


def abstract_model(config: ModelConfig, execution: Execution) -> Model:
    """Splits the model once; `init` maps a PRNG key to parameters, `nnx.merge` undoes the split.

    Call it outside `jax.set_mesh`: flax would take the logical axes for mesh axes.
    """

    def make(key):
        return Transformer(
            config, rngs=nnx.Rngs(key), layer_loop=execution.layer_loop, remat=execution.remat
        )

    def init(key):
        return nnx.to_pure_dict(nnx.state(make(key)))

    graphdef, params = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
    logical_axes = jax.tree.map(
        lambda param: param.get_metadata()["out_sharding"],
        params,
        is_leaf=lambda node: isinstance(node, nnx.Param),
    )
    return Model(graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(logical_axes), init)


def make_init(model: Model, train: TrainConfig) -> Callable[[jax.Array], TrainState]:
    """A pure function from a seed (int32) to the state before the first step."""
    optimizer = make_optimizer(train, make_schedule(train), model.logical_axes)

    def init(seed):
        params = model.init(jax.random.key(seed))
        counters = (jnp.int32(0), jnp.int32(0), jnp.float32(0), jnp.int32(0))
        return TrainState(params, optimizer.init(params), *counters)

    return init


def abstract_state(mesh: Mesh, model: Model, train: TrainConfig) -> TrainState:
    """Shapes and shardings of the state; the optimizer's moments lie where their parameters do."""
    optimizer = make_optimizer(train, make_schedule(train), model.logical_axes)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = param_shardings(mesh, model.params, model.logical_axes)

    def struct(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(struct, model.params, shardings)
    opt_state = optax.tree_map_params(
        optimizer, struct, jax.eval_shape(optimizer.init, model.params), shardings,
        transform_non_params=lambda x: struct(x, replicated),
    )  # fmt: skip
    number, count = (
        jax.ShapeDtypeStruct((), dtype, sharding=replicated) for dtype in (jnp.float32, jnp.int32)
    )
    return TrainState(params, opt_state, count, count, number, count)  # type: ignore[arg-type]


def forget_losses(state: TrainState) -> TrainState:
    """The state after its mean loss has been logged."""
    return state._replace(loss_sum=np.float32(0), loss_steps=np.int32(0))  # type: ignore[arg-type]
