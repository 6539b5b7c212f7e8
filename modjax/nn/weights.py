"""Reading and writing a model's weights as named matrices, for checkpoints of other libraries."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from modjax.errors import require
from modjax.nn.lm import Transformer

STACKED = ("layers", "experts")  # logical axes along which a parameter has several matrices


class Place(NamedTuple):
    """The place of a named matrix in a model.

    path: path of the parameter that holds the matrix.
    index: index of the matrix along the parameter's stacked axes.
    shape: shape of the matrix as the parameter stores it.
    transposed: whether the parameter stores it as (out, in) instead of (in, out).
    role: the parameter's role, see modjax.nn.params; None for a measured value.
    """

    path: tuple[Any, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool
    role: str | None

    def parameter(self, weights: Any) -> Any:
        """Returns the parameter that holds the matrix, from a nested dict of arrays."""
        return functools.reduce(operator.getitem, self.path, weights)


def places(model: Transformer) -> dict[str, Place]:
    """Returns the place of each named matrix.

    model: its layers must be stacked, see `unstack`. It may be abstract (nnx.eval_shape).
    """
    depths, found = model.stack.depths(), {}
    for path, param in _parameters(model):
        about = param.get_metadata()
        stacked = [axis for axis in about["out_sharding"] if axis in STACKED]
        for index in np.ndindex(param.shape[: len(stacked)]):
            parts = [str(part) for part in path]
            if "experts" in stacked:
                parts.insert(-1, str(index[-1]))
            if "layers" in stacked:
                parts[2] = str(depths[parts[2]][index[0]])
            shape, transposed = param.shape[len(stacked) :], about.get("transposed", False)
            found[".".join(parts)] = Place(path, index, shape, transposed, about.get("role"))
    return found


def named_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Returns the weights and measured values of a model by name: matrices (in, out) and vectors.

    The heads of attention are a dim of their own, as in (d_model, heads, head_dim) for w_q.
    A name has the layer's depth, the path within the layer, and an expert's number, as in
    "stack.blocks.3.inner.w_in".
    model: its layers must be stacked, see `unstack`.
    """
    return _matrices(model, {path: np.asarray(p[...]) for path, p in _parameters(model)})


def write_weights(model: Transformer, weights: Mapping[str, Any]) -> None:
    """Replaces all weights and measured values of a model, by the names of `named_weights`.

    Raises InputError for a missing or unknown name, and for a matrix of another shape.
    """
    state = _parameters(model)
    storage = {path: np.empty(param.shape, param.dtype) for path, param in state}
    matrices = _matrices(model, storage)
    for name in matrices.keys() ^ weights.keys():
        said = "missing" if name in matrices else "unknown: no weight of the model has this name"
        require(False, "weights", name, said)
    for name, matrix in matrices.items():
        given = np.shape(weights[name])
        require(given == matrix.shape, f"weights.{name}", given, f"must have shape {matrix.shape}")
        matrix[...] = weights[name]
    new = [(path, param.replace(storage[path])) for path, param in state]
    nnx.update(model, nnx.from_flat_state(new))


def _parameters(model: Transformer) -> Any:
    return nnx.to_flat_state(nnx.state(model))


def _matrices(model: Transformer, storage: Mapping[Any, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the named matrices, as views of `storage`: an array for each parameter's path."""
    return {
        name: storage[place.path][place.index].T
        if place.transposed
        else storage[place.path][place.index]
        for name, place in places(model).items()
    }
