"""State of training from step to step, and its creation on a mesh."""

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
from modjax.sharding import weight_sharding
from modjax.specs import ModelSpec, TrainConfig
from modjax.specs.run import ROUTER_ROLES
from modjax.training.optimizer import make_schedule, optimizer_for

# The first values of the last four fields of TrainState.
ZEROS = (np.int32(0), np.int32(0), np.float32(0), np.int32(0))


class Weights(NamedTuple):
    """Weights of a model in three parts, each a nested dict of arrays.

    params: trained parameters, float32.
    frozen: all other parameters, in the dtype that the model computes in.
    measured: numbers that training measures.
    """

    params: Any
    frozen: Any
    measured: Any


class TrainState(NamedTuple):
    """State of training between two steps.

    params, frozen, measured: weights, see Weights.
    opt_state: state of the optimizer of `params`.
    step: number of updates so far, int32.
    diverged_step: first step whose loss or gradient was not finite, or 0.
    loss_sum, loss_steps: sum and number of the losses since the last line of metrics. A line can
      report their mean without the host waiting for each.
    """

    params: Any
    frozen: Any
    measured: Any
    opt_state: Any
    step: jax.Array
    diverged_step: jax.Array
    loss_sum: jax.Array
    loss_steps: jax.Array


class Model(NamedTuple):
    """A model without its arrays; `nnx.merge(graphdef, *weights)` is the model.

    weights: shape and dtype of each weight, as a run stores it.
    axes: logical axes of each weight's dims.
    roles, decays: role of each trained parameter, and whether it decays, see modjax.nn.params.
    """

    config: ModelSpec
    graphdef: Any
    weights: Weights
    axes: Weights
    roles: Any
    decays: Any


def abstract_model(config: ModelSpec, trained: str = "all") -> Model:
    """Returns a model without its arrays. trained: see TrainConfig."""

    def is_trained(path: Any, variable: nnx.Variable) -> bool:
        everything = trained == "all" and isinstance(variable, nnx.Param)
        return everything or variable.get_metadata("role", None) in ROUTER_ROLES

    def parts() -> tuple[Any, ...]:
        module = Transformer(config, rngs=nnx.Rngs(0))
        return nnx.split(module, is_trained, nnx.Param, Measured)

    def about(name: str, state: Any) -> Any:
        return nnx.to_pure_dict(state, lambda variable: variable.get_metadata(name))

    def shapes(state: Any, dtype: Any) -> Any:
        return nnx.to_pure_dict(
            state, lambda variable: jax.ShapeDtypeStruct(variable.shape, dtype or variable.dtype)
        )

    graphdef, *states = jax.eval_shape(parts)
    weights = Weights(*map(shapes, states, (jnp.float32, jnp.dtype(config.dtype), None)))
    axes = Weights(*(about("out_sharding", state) for state in states))
    roles, decays = about("role", states[0]), about("decays", states[0])
    return Model(config, graphdef, weights, axes, roles, decays)


def joined(*parts: Any) -> Any:
    """Returns one nested dict of weights from the parts of Weights."""
    return nnx.to_pure_dict(nnx.merge_state(*parts))


def abstract_weights(mesh: Mesh, model: Model) -> Weights:
    """Returns the shape, dtype and sharding of each weight.

    Raises InputError if a dim does not split evenly over the mesh.
    """

    def one(path: Any, leaf: Any, axes: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path[1:])
        return struct(leaf, weight_sharding(mesh, leaf.shape, axes, name))

    return jax.tree_util.tree_map_with_path(one, model.weights, model.axes)


def make_init(model: Model, train: TrainConfig) -> Callable[..., TrainState]:
    """Returns a pure function (seed, weights=None) that makes the state before the first step.

    seed: int32.
    weights: nested dict of weights to start from; others are drawn from the seed.
    """
    optimizer = optimizer_for(model.roles, model.decays, train, make_schedule(train))

    def init(seed: Any, weights: Any = None) -> TrainState:
        module = Transformer(model.config, rngs=nnx.Rngs(jax.random.key(seed)))
        drawn = nnx.to_pure_dict(nnx.state(module))

        def one(path: Any, leaf: Any) -> jax.Array:
            given: Any = weights or {}
            found: Any = drawn
            for key in path[1:]:  # the first names the part of Weights
                given, found = given.get(key.key, {}), found[key.key]
            return (found if isinstance(given, dict) else given).astype(leaf.dtype)

        parts: Weights = jax.tree_util.tree_map_with_path(one, model.weights)
        return TrainState(*parts, optimizer.init(parts.params), *map(jnp.asarray, ZEROS))

    return init


def abstract_state(mesh: Mesh, model: Model, train: TrainConfig) -> TrainState:
    """Returns the shape, dtype and sharding of each array of the state.

    The optimizer's moments are sharded like their parameters.
    """
    optimizer = optimizer_for(model.roles, model.decays, train, make_schedule(train))
    weights, replicated = abstract_weights(mesh, model), NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, param: struct(leaf, param.sharding),
        jax.eval_shape(optimizer.init, weights.params),
        weights.params,
        transform_non_params=lambda leaf: struct(leaf, replicated),
    )
    return TrainState(*weights, opt_state, *(struct(zero, replicated) for zero in ZEROS))


def struct(leaf: Any, sharding: Any) -> Any:
    """Returns a ShapeDtypeStruct like `leaf`, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def forget_losses(state: TrainState) -> TrainState:
    """Returns the state with its losses set to 0, after their mean has been logged."""
    return state._replace(loss_sum=np.float32(0), loss_steps=np.int32(0))  # type: ignore[arg-type]
