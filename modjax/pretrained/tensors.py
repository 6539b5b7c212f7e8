"""Tensors of a pretrained model to weights of a Transformer, and back.

Hugging Face stores matrices as (out, in); most of ours are (in, out), with the heads apart.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
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


class Slot(NamedTuple):
    """The rows of a tensor that hold one of our matrices.

    tensor: its name.
    first: the first row.
    inputs: how many leading dims of our matrix are inputs, and so the tensor's columns. With 0 the
      tensor has the dims of our matrix in order; "flat" tensors have them in one dim.
    place: of our matrix.
    """

    tensor: str
    first: int
    inputs: int
    flat: bool
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        dims, inputs = self.place.shape, self.inputs
        if self.flat:
            return (math.prod(dims),)
        return (math.prod(dims[inputs:]), math.prod(dims[:inputs])) if inputs else dims

    def read(self, files: Files, index: Index) -> np.ndarray:
        """Returns a part of our matrix. index: one slice per dim; inner dims of heads are whole."""
        dims = self.place.shape
        starts = [part.indices(size) for part, size in zip(index, dims, strict=True)]
        shape = [stop - start for start, stop, _ in starts]

        def merged(dims_: range) -> slice:  # one slice for several dims, of which the first varies
            inner = math.prod(dims[d] for d in dims_[1:])
            start, stop, _ = starts[dims_[0]]
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
        """Returns the rows of the tensor from our matrix."""
        return matrix.reshape(self.shape[::-1]).T if self.inputs else matrix.reshape(self.shape)


def abstract(config: ModelSpec) -> Transformer:
    """Returns a model without arrays."""
    # Unlike nnx.eval_shape, this works under a mesh, whose axes are not the logical ones.
    return nnx.merge(*jax.eval_shape(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))))


def find_slots(
    model: Transformer, family: Family, tensors: Collection[str] = ()
) -> dict[str, Slot]:
    """Returns where a family stores each of our matrices that it has.

    The i-th attention and the i-th MLP of a model are those of layer i, whatever is around them.
    tensors: names of the tensors in the files. If they have an MLP in place of experts, each expert
      of ours is a copy of it.
    """
    ours, found = places(model), {}
    for name in ours.keys() & family.tensors.keys():  # at the ends
        inputs, flat = int(name == "unembed.w_logits"), name == "final_norm.scale"
        found[name] = Slot(family.tensors[name], 0, inputs, flat, ours[name])
    for kind, mark in {"attention": r"\.w_q$", "mlp": r"(\.experts\.0)?\.w_in$"}.items():
        marked = sorted((name for name in ours if re.search(mark, name)), key=in_order)
        whole = (re.sub(mark, "", name) for name in marked)
        others = r"\.(router|shared|rule|causal|experts)\b"
        prefixes = [prefix for prefix in whole if not re.search(others, prefix)]
        for i, prefix in enumerate(prefixes):
            experts = sum(name.startswith(f"{prefix}.experts.") for name in ours)
            for expert in range(max(1, experts)):
                layer = f"{family.layers}{i}."
                found |= _of_layer(ours, f"{prefix}.", layer, kind, expert, family, tensors)
    return found


def in_order(name: str) -> list[Any]:
    """Returns a sort key under which stack.blocks.2 is before stack.blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _of_layer(ours, prefix, layer, kind, expert, family, tensors) -> dict[str, Slot]:
    """Returns the slots of one attention, MLP or expert."""
    found, rows = {}, Counter()
    dense = layer + family.tensors["mlp.w_in"] in tensors
    for name, theirs in family.tensors.items():
        leaf = prefix + name.removeprefix(f"{kind}.").format(expert)
        if not name.startswith(f"{kind}.") or leaf not in ours:
            continue
        if dense and name == "mlp.router.w":
            continue
        if dense:
            theirs = family.tensors[name.replace("experts.{}.", "")]
        tensor = layer + theirs.format(expert)
        flat = re.search(r"(^|\.)(b_\w+|scale)$", leaf) is not None
        inputs = 0 if flat or ours[leaf].transposed else 2 if leaf.endswith("w_out") else 1
        found[leaf] = Slot(tensor, rows[tensor], inputs, flat, ours[leaf])
        rows[tensor] += found[leaf].shape[0]
    return found


def tensor_shapes(slots: Mapping[str, Slot]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor in which our matrices are stored."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots.values():
        rows, *columns = slot.shape
        before = shapes.get(slot.tensor, (0,))[0]
        shapes[slot.tensor] = (max(before, slot.first + rows), *columns)
    return shapes


def check_tensors(files: Files, slots: Mapping[str, Slot]) -> None:
    """Raises one InputError for all tensors that are missing, unexpected or of another shape."""
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
    """Returns our weights as a nested dict of arrays, of those that the files have.

    structs: nested dict with the shape, dtype and sharding of each weight. Every device's part of
      an array is read by itself. Raises InputError for a number that is not finite.
    """
    by_path: dict[Any, dict[tuple[int, ...], Slot]] = {}
    for slot in slots.values():
        by_path.setdefault(slot.place.path, {})[slot.place.index] = slot
    found: dict[str, Any] = {}
    # The largest first: beside an array there is a copy of it, which then adds to fewer others.
    for path, each in sorted(by_path.items(), key=lambda item: -_numbers(item[1].values())):
        struct, into = structs, found
        for key in path[:-1]:
            struct, into = struct[key], into.setdefault(key, {})
        into[path[-1]] = _array(files, each, struct[path[-1]])
    return found


def _numbers(slots: Iterable[Slot]) -> int:
    return sum(math.prod(slot.shape) for slot in slots)


def _array(files: Files, slots: Mapping[tuple[int, ...], Slot], struct: Any) -> jax.Array:
    """Returns one stacked array. slots: of its matrices, by their index."""

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
    return jax.block_until_ready(made)  # which frees what it was copied from


def write_tensor(weights: Any, slots: Collection[Slot]) -> np.ndarray:
    """Returns a tensor from our weights, a nested dict of arrays. slots: of its rows, in order."""
    rows = []
    for slot in slots:
        leaf = weights
        for key in slot.place.path:
            leaf = leaf[key]
        rows.append(slot.write(np.asarray(leaf[slot.place.index])))
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
