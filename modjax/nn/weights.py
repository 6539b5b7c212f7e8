"""Reading and writing a model's weights as named matrices, for checkpoints of other libraries."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from modjax.errors import require
from modjax.nn.lm import Transformer

STACKED = ("layers", "experts")  # logical axes along which a parameter has several matrices


def named_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Returns each weight and measured number of a model as a matrix (in, out), or a vector.

    A name has the layer's depth, the places of its parts, and an expert's number, as in
    "stack.blocks.3.inner.w_in".
    model: its layers must be stacked, see `unstack`.
    """
    return _matrices(model, {path: np.asarray(p[...]) for path, p in _parameters(model)})


def write_weights(model: Transformer, weights: Mapping[str, Any]) -> None:
    """Replaces all weights of a model, by the names of `named_weights`.

    Raises InputError for a missing or unknown name, and for a matrix of another shape.
    """
    state = _parameters(model)
    storage = {path: np.empty(param.shape, param.dtype) for path, param in state}
    places = _matrices(model, storage)
    for name in places.keys() ^ weights.keys():
        said = "missing" if name in places else "unknown: no weight of the model has this name"
        require(False, "weights", name, said)
    for name, place in places.items():
        given = np.shape(weights[name])
        require(given == place.shape, f"weights.{name}", given, f"must have shape {place.shape}")
        place[...] = weights[name]
    new = [(path, param.replace(storage[path])) for path, param in state]
    nnx.update(model, nnx.from_flat_state(new))


def _parameters(model: Transformer) -> Any:
    return nnx.to_flat_state(nnx.state(model))


def _matrices(model: Transformer, storage: Mapping[Any, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the named matrices, as views of `storage`: an array for each parameter's path.

    A parameter stacks the matrices of several layers and experts, and may store them as (out, in).
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
            matrix = storage[path][index]
            found[".".join(parts)] = matrix.T if about.get("transposed", False) else matrix
    return found
