"""The weights of a model as named plain matrices, both ways: the seam for other checkpoints."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from modjax.errors import require
from modjax.nn.lm import Transformer

STACKED = ("layers", "experts")  # logical axes along which a parameter holds several matrices


class View(NamedTuple):
    """One plain matrix, (in, out), or vector in the storage of a parameter.

    path: of the parameter in `nnx.state(model)`. index: of the matrix among those stacked in it.
    transposed: whether the parameter stores (out, in).
    """

    path: tuple[Any, ...]
    index: tuple[int, ...]
    transposed: bool

    def of(self, parameters: Mapping[tuple[Any, ...], np.ndarray]) -> np.ndarray:
        """Returns the matrix, which shares the memory of its parameter."""
        matrix = parameters[self.path][self.index]
        return matrix.T if self.transposed else matrix


def views(model: Transformer) -> dict[str, View]:
    """Returns a view of each weight and measured number, by names as stack.blocks.3.inner.w_in.

    A layer is named by its depth, its parts by their places, an expert by its number.
    model: its layers are stacked, see `unstack`.
    """
    depths, found = model.stack.depths(), {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        about = param.get_metadata()
        stacked = [axis for axis in about["out_sharding"] if axis in STACKED]
        for index in np.ndindex(param.shape[: len(stacked)]):
            parts = [str(part) for part in path]
            if "experts" in stacked:
                parts.insert(-1, str(index[-1]))
            if "layers" in stacked:
                parts[2] = str(depths[parts[2]][index[0]])
            found[".".join(parts)] = View(path, index, about.get("transposed", False))
    return found


def named_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Returns every weight and measured number of a model, by the names of `views`."""
    parameters = {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model))}
    return {name: view.of(parameters) for name, view in views(model).items()}


def write_weights(model: Transformer, weights: Mapping[str, Any]) -> None:
    """Gives a model other weights, by the names of `views`: all of them, and no others.

    Raises InputError for a name that is missing or unknown, and for a matrix of another shape.
    """
    known, state = views(model), nnx.to_flat_state(nnx.state(model))
    for name in known.keys() ^ weights.keys():
        said = "missing" if name in known else "unknown: no weight of the model has this name"
        require(False, "weights", name, said)
    parameters = {path: np.empty(param.shape, param.dtype) for path, param in state}
    for name, view in known.items():
        place, given = view.of(parameters), np.shape(weights[name])
        require(given == place.shape, f"weights.{name}", given, f"must have shape {place.shape}")
        place[...] = weights[name]
    new = [(path, param.replace(parameters[path])) for path, param in state]
    nnx.update(model, nnx.from_flat_state(new))
