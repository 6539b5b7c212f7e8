"""Conversion of Hugging Face's tensors to weights of a Transformer, and back.

Hugging Face stores matrices as (out, in). Most of ours are (in, out), with heads as a separate dim.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from modjax.errors import require
from modjax.nn import Transformer
from modjax.nn.weights import Place, places
from modjax.pretrained.families import Family
from modjax.pretrained.files import Files, Index
from modjax.specs import ModelSpec
from modjax.specs.run import ROUTER_ROLES


class Slot(NamedTuple):
    """The rows of one of Hugging Face's tensors that hold one of our matrices.

    tensor: the tensor's name.
    first: the index of the first row.
    inputs: the number of leading dims of our matrix that the tensor merges into its columns. With
      0, both have the same dims in the same order.
    flat: whether the tensor merges all dims into one.
    place: the place of our matrix in the model.
    """

    tensor: str
    first: int
    inputs: int
    flat: bool
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows in the tensor."""
        dims, inputs = self.place.shape, self.inputs
        if self.flat:
            return (math.prod(dims),)
        return (math.prod(dims[inputs:]), math.prod(dims[:inputs])) if inputs else dims

    def read(self, files: Files, index: Index) -> np.ndarray:
        """Returns a part of our matrix.

        index: one slice per dim. Only the first of several merged dims may be cut.
        """
        dims = self.place.shape
        starts = [part.indices(size) for part, size in zip(index, dims, strict=True)]
        shape = [stop - start for start, stop, _ in starts]

        def merged(group: range) -> slice:  # one slice for several dims
            inner = math.prod(dims[d] for d in group[1:])
            start, stop, _ = starts[group[0]]
            return slice(start * inner, stop * inner)

        every = range(len(dims))
        if self.flat:
            where = (merged(every),)
        elif self.inputs:
            where = (merged(every[self.inputs :]), merged(every[: self.inputs]))
        else:
            where = tuple(merged(every[d : d + 1]) for d in every)
        rows = slice(where[0].start + self.first, where[0].stop + self.first)
        found = files.read(self.tensor, (rows, *where[1:]))
        return (found.T if self.inputs else found).reshape(shape)

    def write(self, matrix: np.ndarray) -> np.ndarray:
        """Returns our matrix as these rows of the tensor."""
        return matrix.reshape(self.shape[::-1]).T if self.inputs else matrix.reshape(self.shape)


def abstract(spec: ModelSpec) -> Transformer:
    """Returns a model with a jax.ShapeDtypeStruct in place of each array."""
    # Unlike nnx.eval_shape, this works under a mesh, whose axes are not the logical ones.
    return nnx.merge(*jax.eval_shape(lambda: nnx.split(Transformer(spec, rngs=nnx.Rngs(0)))))


def find_slots(
    model: Transformer, family: Family, tensors: Collection[str] = ()
) -> dict[str, Slot]:
    """Returns the slot of each of our matrices that a family has, by our name.

    The i-th attention and the i-th MLP of a model belong to layer i, whatever is around them.
    tensors: names of tensors in the files. If they hold an MLP where the model has experts, every
      expert gets the slots of that MLP.
    """
    ours, found = places(model), {}
    for name in ours.keys() & family.tensors.keys():  # outside all layers
        inputs, flat = int(name == "unembed.w_logits"), name == "final_norm.scale"
        found[name] = Slot(family.tensors[name], 0, inputs, flat, ours[name])
    for kind, ending in {"attention": r"\.w_q$", "mlp": r"(\.experts\.0)?\.w_in$"}.items():
        ends = sorted((name for name in ours if re.search(ending, name)), key=by_number)
        others = r"\.(router|shared|rule|causal|experts)\b"
        prefixes = (re.sub(ending, "", name) for name in ends)
        prefixes = [prefix for prefix in prefixes if not re.search(others, prefix)]
        for i, prefix in enumerate(prefixes):
            layer, mine = f"{family.layer_prefix}{i}.", f"{prefix}.experts."
            experts = sum(name.startswith(mine) and name.endswith(".w_in") for name in ours)
            for expert in range(max(1, experts)):
                found |= _sublayer_slots(ours, f"{prefix}.", layer, kind, expert, family, tensors)
    return found


def by_number(name: str) -> list[Any]:
    """Returns a sort key that puts stack.blocks.2 before stack.blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _sublayer_slots(ours, prefix, layer, kind, expert, family, tensors) -> dict[str, Slot]:
    """Returns the slots of one attention, MLP or expert. prefix, layer: of our names, of theirs."""
    found, rows = {}, Counter()
    dense = layer + family.tensors["mlp.w_in"] in tensors
    for name, theirs in family.tensors.items():
        leaf = prefix + name.removeprefix(f"{kind}.").format(expert)
        absent = leaf not in ours or not name.startswith(f"{kind}.")
        if absent or (dense and name == "mlp.router.w"):
            continue
        if dense:
            theirs = family.tensors[name.replace("experts.{}.", "")]
        tensor = layer + theirs.format(expert)
        flat = re.search(r"(^|\.)(b_\w+|scale)$", leaf) is not None
        inputs = 0 if flat or ours[leaf].transposed else 2 if leaf.endswith("w_out") else 1
        found[leaf] = Slot(tensor, rows[tensor], inputs, flat, ours[leaf])
        rows[tensor] += found[leaf].shape[0]
    return found


def router_slots(model: Transformer, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Returns the slots of our matrices in a routers file, where they have our names.

    slots: those in the base. A routers file has all other matrices, and the base's own routers.
    """
    return {
        name: Slot(name, 0, int(place.transposed), False, place)
        for name, place in places(model).items()
        if name not in slots or place.role in ROUTER_ROLES
    }


def tensor_shapes(slots: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor that has slots, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots.values():
        rows, *columns = slot.shape
        before = shapes.get(slot.tensor, (0,))[0]
        shapes[slot.tensor] = (max(before, slot.first + rows), *columns)
    return shapes


def check_tensors(files: Files, slots: Mapping[str, Slot]) -> None:
    """Raises one InputError for all tensors that are missing, unexpected or of a wrong shape."""
    expected, given = tensor_shapes(slots), files.shapes
    other = sorted(n for n in expected.keys() & given.keys() if given[n] != expected[n])
    faults = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [f"{n} {given[n]}, not {expected[n]}" for n in other],
    }
    said = [
        f"{len(names)} {fault}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        for fault, names in faults.items()
        if names
    ]
    require(not said, "tensors", files.path, "; ".join(said))


def read_weights(files: Files, slots: Mapping[str, Slot], structs: Any) -> dict[str, Any]:
    """Returns the weights that have slots, as a nested dict of arrays.

    structs: nested dict with the shape, dtype and sharding of each weight. The part of each device
      is read separately.
    Raises InputError if a weight is not finite.
    """
    by_path: dict[Any, dict[tuple[int, ...], Slot]] = {}
    for slot in slots.values():
        by_path.setdefault(slot.place.path, {})[slot.place.index] = slot
    found: dict[str, Any] = {}
    sizes = {path: sum(math.prod(s.shape) for s in each.values()) for path, each in by_path.items()}
    # Largest first: making an array takes a copy of it, so make it while there are few others.
    for path in sorted(by_path, key=sizes.__getitem__, reverse=True):
        struct, into = structs, found
        for key in path[:-1]:
            struct, into = struct[key], into.setdefault(key, {})
        into[path[-1]] = _array(files, by_path[path], struct[path[-1]])
    return found


def _array(files: Files, slots: Mapping[tuple[int, ...], Slot], struct: Any) -> jax.Array:
    """Returns one parameter. slots: those of its matrices, by their index in the stacked dims."""

    def part(given: Any) -> np.ndarray:
        index = [slice(*i.indices(size)) for i, size in zip(given, struct.shape, strict=True)]
        out = np.empty([i.stop - i.start for i in index], struct.dtype)
        stacked = len(next(iter(slots)))
        for at in np.ndindex(out.shape[:stacked]):
            slot = slots[tuple(n + i.start for n, i in zip(at, index, strict=False))]
            out[at] = slot.read(files, tuple(index[stacked:]))
            finite = np.isfinite(out[at]).all()
            require(bool(finite), files.path, slot.tensor, "has numbers that are not finite")
        return out

    made = jax.make_array_from_callback(struct.shape, struct.sharding, part)
    return jax.block_until_ready(made)  # frees the copy that it was made from


def write_tensor(weights: Any, slots: Collection[Slot]) -> np.ndarray:
    """Returns one tensor from a nested dict of our weights. slots: all of its rows, in order."""
    rows = [
        slot.write(np.asarray(slot.place.parameter(weights)[slot.place.index])) for slot in slots
    ]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
