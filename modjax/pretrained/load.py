"""Reading of a pretrained model: whole, or into another model with the same attentions and MLPs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from modjax.data.codecs.files import find_tokenizer
from modjax.data.codecs.tokenizer import Tokenizer
from modjax.errors import require
from modjax.nn.weights import places
from modjax.pretrained.config import read_config, without_training
from modjax.pretrained.families import family_of
from modjax.pretrained.files import Files, open_files, open_routers
from modjax.pretrained.tensors import (
    Slot,
    abstract,
    by_number,
    check_tensors,
    find_slots,
    read_weights,
    router_slots,
)
from modjax.sharding import weight_sharding
from modjax.specs import MLP, Attention, Layer, ModelSpec, MoE, Router, to_dict
from modjax.specs.layer import segments_of
from modjax.specs.run import ROUTER_ROLES


class Pretrained(NamedTuple):
    """A pretrained model. `nnx.merge(graphdef, weights)` builds the module.

    weights: nested dict of arrays.
    tokenizer: None if the files have none.
    config: the fields of config.json.
    """

    spec: ModelSpec
    graphdef: Any
    weights: Any
    tokenizer: Tokenizer | None
    config: dict[str, Any]


def from_pretrained(
    path: str | Path,
    *,
    routers: str | Path | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Returns a pretrained model, read from a Hugging Face folder or a GGUF file.

    routers: a routers file, as `modjax tune` writes it: the model has its layers and weights around
      those of `path`.
    dtype: "float32" or "bfloat16", for the weights and the computation. Trained routers stay
      float32. None takes the dtype of the routers file. Without one, it takes "bfloat16" if most of
      the files is bfloat16, and otherwise "float32".
    mesh: see `modjax.training.mesh.make_mesh`. Each device reads its own part of every weight.
      None uses one device.
    Raises InputError if modjax cannot compute the model that the files describe, and for routers of
    another base.
    """
    files, added = open_files(path), None
    if routers is None:
        spec = spec_of(files, dtype)
    else:
        spec, added = open_routers(routers, files)
        spec = dataclasses.replace(spec, dtype=dtype or spec.dtype)
    model = abstract(spec)
    graphdef, state = nnx.split(model)
    slots, _ = match_weights(files, spec)
    if added is not None:
        own = router_slots(model, slots)
        check_tensors(added, own)
        slots, files = slots | own, added

    def struct(path: Any, variable: Any) -> jax.ShapeDtypeStruct:
        axes, name = variable.get_metadata("out_sharding"), ".".join(map(str, path))
        sharding: Any = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            sharding = weight_sharding(mesh, variable.shape, axes, name)
        exact = added is not None and variable.get_metadata("role", None) in (None, *ROUTER_ROLES)
        dtype = variable.dtype if exact else jnp.dtype(spec.dtype)  # as training stores them
        return jax.ShapeDtypeStruct(variable.shape, dtype, sharding=sharding)

    tokenizer = find_tokenizer(path)
    weights = read_weights(files, slots, nnx.to_pure_dict(nnx.map_state(struct, state)))
    return Pretrained(spec, graphdef, weights, tokenizer, files.config)


def pretrained_spec(path: str | Path, dtype: str | None = None) -> ModelSpec:
    """Returns the spec of a pretrained model, without reading its weights. See from_pretrained."""
    return spec_of(open_files(path), dtype)


def model_fields(path: str | Path, layer: Callable[[int, Layer], Layer]) -> dict[str, Any]:
    """Returns a config's `model`: a pretrained model with layer(i, block) in place of block i."""
    spec = pretrained_spec(path)
    blocks = [layer(i, block) for i, block in enumerate(spec.blocks())]
    return to_dict(dataclasses.replace(spec, layers=segments_of(blocks)), defaults=False)


def match_weights(files: Files, spec: ModelSpec) -> tuple[dict[str, Slot], list[str]]:
    """Returns a model's slots in the files, and the names of its weights that have none.

    spec: a model with the attentions and MLPs of the files in the same order, inside any layers. It
      may have experts in place of an MLP; each expert then starts as a copy of that MLP.
    Raises InputError if a size, the embedding, the head, an attention or an MLP differs.
    """
    theirs = spec_of(files, spec.dtype)
    sizes = [name for name in spec.shape._fields if name not in ("num_layers", "streams", "width")]
    for name in sizes:
        ours, other = getattr(spec.shape, name), getattr(theirs.shape, name)
        require(ours == other, f"model.{name}", ours, f"must be {other}, as in {files.path}")
    for name in ("embed", "head"):
        ours, other = getattr(spec, name), getattr(theirs, name)
        require(ours == other, f"model.{name}", str(ours), f"must be {other}, as in {files.path}")
    ours, given = (list(map(without_training, _sublayers(model))) for model in (spec, theirs))
    accepted = f"must be {len(given)}, as in {files.path}"
    require(len(ours) == len(given), "attentions and MLPs", len(ours), accepted)
    for one, other in zip(ours, given, strict=True):
        same = one == other
        if isinstance(one, MoE) and isinstance(other, MLP):
            copy = MLP(one.activation, one.norm)
            same = copy == other and one.width in (None, spec.d_ff)
        require(same, "model.layers", str(one), f"must be {other}, as in {files.path}")
    model = abstract(spec)
    slots = find_slots(model, family_of(files.config), files.shapes)
    check_tensors(files, slots)
    return slots, sorted(places(model).keys() - slots.keys(), key=by_number)


def _sublayers(spec: ModelSpec) -> list[Any]:
    """Returns every Attention, MLP and MoE of a model, in order, except those in routers."""
    found: list[Any] = []
    waiting: list[Any] = spec.blocks()
    while waiting:
        layer = waiting.pop(0)
        if isinstance(layer, Attention | MLP | MoE):
            found.append(layer)
        elif not isinstance(layer, Router):
            waiting = [*layer.inside(), *waiting]
    return found


def spec_of(files: Files, dtype: str | None) -> ModelSpec:
    """Returns the spec of opened files. dtype: see from_pretrained."""
    dtype = dtype or ("bfloat16" if files.dtype == "bfloat16" else "float32")
    tied = family_of(files.config).tensors["unembed.w_logits"] not in files.shapes
    return read_config(files.config, tied=tied, dtype=dtype)
