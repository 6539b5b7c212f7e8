"""The state of training from step to step, and how it is created on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.nn import Transformer
from modjax.nn.params import Measured
from modjax.spec import ModelSpec, TrainConfig
from modjax.spec.run import ROUTER_ROLES
from modjax.training.optimizer import Role, Schedule, make_schedule, optimizer_for
from modjax.training.sharding import param_shardings


class TrainState(NamedTuple):
    """params: nested dict of arrays, see `stored`. measured: what training measures, nested alike.
    opt_state: of what is trained. step: updates made so far, int32.

    diverged_step: the first step whose loss or gradient was not finite, 0 while there is none.
    loss_sum, loss_steps: of the losses since the last line of metrics, so that a line can tell
      their mean without the host waiting for each.
    """

    params: Any
    measured: Any
    opt_state: Any
    step: jax.Array
    diverged_step: jax.Array
    loss_sum: jax.Array
    loss_steps: jax.Array


class Weights(NamedTuple):
    """The part of a TrainState that a model computes with."""

    params: Any
    measured: Any


class Model(NamedTuple):
    """A model without its arrays.

    graphdef: `nnx.merge(graphdef, joined(params, measured))` is the model. params, measured:
    float32 shapes. logical_axes, roles: of every parameter. init: a PRNG key -> (params, measured).
    dtype: the one that the model computes in.
    """

    graphdef: Any
    params: Any
    measured: Any
    logical_axes: Any
    roles: Any
    init: Callable[[jax.Array], tuple[Any, Any]]
    dtype: Any


def abstract_model(config: ModelSpec) -> Model:
    """Splits the model once.

    Call it outside `jax.set_mesh`: flax would take the logical axes for mesh axes.
    """

    def make(key):
        return Transformer(config, rngs=nnx.Rngs(key))

    def init(key):
        _, params, measured = nnx.split(make(key), nnx.Param, Measured)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(measured)

    model = nnx.eval_shape(make, jax.random.key(0))
    _, params, measured = nnx.split(model, nnx.Param, Measured)

    def said(of: Callable[[dict[str, Any]], Any]) -> Any:
        """Returns a fact that every parameter says of itself."""
        found = jax.tree.map(
            lambda param: of(param.get_metadata()),
            params,
            is_leaf=lambda node: isinstance(node, nnx.Param),
        )
        return nnx.to_pure_dict(found)

    return Model(
        nnx.split(model)[0],
        nnx.to_pure_dict(params),
        nnx.to_pure_dict(measured),
        said(lambda data: data["out_sharding"]),
        said(lambda data: Role(data["role"], data["decays"])),
        init,
        jnp.dtype(config.dtype),
    )


def joined(params: Any, measured: Any) -> Any:
    """Returns parameters and measured numbers as one tree."""
    return nnx.to_pure_dict(nnx.merge_state(nnx.State(params), nnx.State(measured)))


def trainable(model: Model, train: TrainConfig) -> Any:
    """Returns whether each parameter is trained."""
    routers = train.trained == "routers"
    return jax.tree.map(lambda role: not routers or role.name in ROUTER_ROLES, model.roles)


def stored(params: Any, model: Model, train: TrainConfig) -> Any:
    """Returns parameters as a run stores them: trained ones in float32, frozen in model.dtype."""
    return jax.tree.map(
        lambda trained, leaf: leaf.astype(jnp.float32 if trained else model.dtype),
        trainable(model, train),
        params,
    )


def trained_part(state: Any, mask: Any) -> Any:
    """Returns a TrainState, or Weights, as a checkpoint holds it: with None for what is frozen."""
    return state._replace(params=parted(state.params, mask)[0])


def parted(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Returns a tree's leaves where `mask` is true, and the others, with None in the gaps."""
    mine = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    others = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return mine, others


def together(mine: Any, others: Any) -> Any:
    """Returns the tree that `parted` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, mine, others, is_leaf=lambda node: node is None
    )


def make_optimizer(
    model: Model, train: TrainConfig, schedule: Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters, see optimizer.optimizer_for."""
    roles = parted(model.roles, trainable(model, train))[0]
    return optimizer_for(roles, train, schedule)


def make_init(model: Model, train: TrainConfig) -> Callable[[jax.Array], TrainState]:
    """Returns a pure function from a seed (int32) to the state before the first step."""
    optimizer, mask = make_optimizer(model, train, make_schedule(train)), trainable(model, train)

    def init(seed):
        params, measured = model.init(jax.random.key(seed))
        counters = (jnp.int32(0), jnp.int32(0), jnp.float32(0), jnp.int32(0))
        params = stored(params, model, train)
        return TrainState(params, measured, optimizer.init(parted(params, mask)[0]), *counters)

    return init


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def abstract_weights(mesh: Mesh, model: Model, train: TrainConfig) -> Weights:
    """Returns shapes, dtypes and shardings of the weights."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = param_shardings(mesh, model.params, model.logical_axes)
    params = jax.eval_shape(lambda params: stored(params, model, train), model.params)
    measured = jax.tree.map(lambda leaf: _struct(leaf, replicated), model.measured)
    return Weights(jax.tree.map(_struct, params, shardings), measured)


def abstract_state(mesh: Mesh, model: Model, train: TrainConfig) -> TrainState:
    """Returns shapes and shardings of the state; moments lie where their parameters do."""
    optimizer, mask = make_optimizer(model, train, make_schedule(train)), trainable(model, train)
    replicated = NamedSharding(mesh, PartitionSpec())
    weights = abstract_weights(mesh, model, train)
    trained = parted(weights.params, mask)[0]
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    opt_state = optax.tree_map_params(
        optimizer,
        _struct,
        jax.eval_shape(optimizer.init, trained),
        places,
        transform_non_params=lambda leaf: _struct(leaf, replicated),
    )
    number, count = (
        jax.ShapeDtypeStruct((), dtype, sharding=replicated) for dtype in (jnp.float32, jnp.int32)
    )
    return TrainState(*weights, opt_state, count, count, number, count)  # type: ignore


def forget_losses(state: TrainState) -> TrainState:
    """Returns the state after its mean loss has been logged."""
    return state._replace(loss_sum=np.float32(0), loss_steps=np.int32(0))  # type: ignore[arg-type]
