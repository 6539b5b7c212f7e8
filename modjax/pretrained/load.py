"""Reading a pretrained model whole, and writing one."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from modjax.errors import InputError, require
from modjax.nn.sharding import partition_spec
from modjax.pretrained.config import family_of, read_config, write_config
from modjax.pretrained.families import ENDS, FAMILIES, NAMES, Family
from modjax.pretrained.files import Files, open_files, write_json, write_tensors
from modjax.pretrained.tensors import (
    Slot,
    abstract,
    check_tensors,
    find_slots,
    read_weights,
    tensor_shapes,
    write_tensor,
)
from modjax.specs import MLP, Attention, Layer, ModelSpec, MoE, Seq, TokenChoice
from modjax.specs.fields import parts
from modjax.specs.layer import segments_of
from modjax.specs.layers.dense import GATED


class Pretrained(NamedTuple):
    """A pretrained model: `nnx.merge(graphdef, weights)` is the model.

    spec: what it computes.
    weights: nested dict of arrays.
    tokenizer: of its files, or None if they have none.
    config: the fields of its config.json.
    """

    spec: ModelSpec
    graphdef: Any
    weights: Any
    tokenizer: Any
    config: dict[str, Any]


def from_pretrained(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Pretrained:
    """Returns a pretrained model from a folder of Hugging Face's form, or from a GGUF file.

    dtype: "float32" or "bfloat16", of the weights and the computation; None takes that of the files
      (float32 for other kinds).
    mesh: as of `modjax.training.mesh.make_mesh`; each device reads its own part of every weight.
      None uses one device.
    Raises InputError for anything in the files that modjax does not compute as they say it.
    """
    files = open_files(path)
    config = spec_of(files, dtype)
    model = abstract(config)
    graphdef, state = nnx.split(model)
    slots = find_slots(model, family_of(files.config))
    check_tensors(files, slots)

    def struct(variable: Any) -> jax.ShapeDtypeStruct:
        axes = partition_spec(variable.get_metadata("out_sharding"))
        one = SingleDeviceSharding(jax.devices()[0])
        sharding = one if mesh is None else NamedSharding(mesh, axes)
        return jax.ShapeDtypeStruct(variable.shape, jnp.dtype(config.dtype), sharding=sharding)

    weights = read_weights(files, slots, nnx.to_pure_dict(state, struct))
    return Pretrained(config, graphdef, weights, None, files.config)


def pretrained_spec(path: str | Path, dtype: str | None = None) -> ModelSpec:
    """Returns the spec of a pretrained model, without reading its weights. See from_pretrained."""
    return spec_of(open_files(path), dtype)


def spec_of(files: Files, dtype: str | None) -> ModelSpec:
    """Returns the spec of opened files. dtype: see from_pretrained."""
    dtype = dtype or ("bfloat16" if files.dtype == "bfloat16" else "float32")
    tied = ENDS["unembed.w_logits"] not in files.shapes
    return read_config(files.config, tied=tied, dtype=dtype)


def save_pretrained(
    out: str | Path,
    spec: ModelSpec,
    weights: Any,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    most: int = 2**31,
) -> None:
    """Writes a model as config.json and safetensors, which transformers loads.

    out: a folder that is made, or empty.
    config: further fields of config.json. Its `model_type` names the family, if that computes the
      same; otherwise it is the first that does, see modjax.pretrained.FAMILIES.
    dtype: of the written tensors; None keeps that of the weights.
    most: bytes of a file; more go to several files.
    Raises InputError for a model that no family computes, such as one with routed layers.
    """
    out, plain = Path(out), _plain(spec)
    first = FAMILIES.get((config or {}).get("model_type", ""))
    fits, fields = _fitting(plain, [first] if first else list(FAMILIES.values()))
    out.mkdir(parents=True, exist_ok=True)
    require(not any(out.iterdir()), "out", str(out), "must be an empty folder, or a new one")
    expected = tensor_shapes(find_slots(abstract(plain), fits))
    if any(map(_ungated, parts(spec, deep=True))):
        fits = dataclasses.replace(fits, names={**fits.names, **UNGATED})
    slots: dict[str, list[Slot]] = {}
    for slot in find_slots(abstract(spec), fits).values():
        slots.setdefault(slot.tensor, []).append(slot)

    def tensor(name: str) -> np.ndarray:
        if name in slots:
            return write_tensor(weights, slots[name])
        return np.full(expected[name], float(name.endswith("up_proj.bias")))  # of UNGATED

    dtype = dtype or jax.tree.leaves(weights)[0].dtype
    write_tensors(out, expected, tensor, dtype, most)
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    write_json(out / "config.json", {**unknown, **(config or {}), **fields})


# An MLP without a gate is written as act(gate) * up, with an `up` that is its bias of 1.
UNGATED = {"mlp.w_in": NAMES["mlp.w_gate"], "mlp.b_in": NAMES["mlp.b_gate"]}


def _ungated(layer: Any) -> bool:
    return isinstance(layer, MLP) and layer.activation not in GATED


def _plain(spec: ModelSpec) -> ModelSpec:
    """Returns a spec that computes the same by blocks of Attention and MLP or MoE alone.

    Raises InputError for other layers. What matters in training only is left out.
    """
    require(spec.streams is None, "model.streams", str(spec.streams), "cannot be exported")
    found: list[Layer] = []
    waiting: list[Any] = spec.blocks()
    while waiting:
        layer = waiting.pop(0)
        if isinstance(layer, Seq):
            waiting = [*layer.parts, *waiting]
            continue
        kind = Attention if len(found) % 2 == 0 else (MLP, MoE)
        accepted = "cannot be exported: Hugging Face has blocks of Attention, then MLP or MoE, only"
        require(isinstance(layer, kind), "model.layers", str(layer), accepted)
        if isinstance(layer, MoE) and isinstance(layer.rule, TokenChoice):
            rule = dataclasses.replace(layer.rule, balance=0.0, z=0.0, bias_rate=0.0)
            layer = dataclasses.replace(layer, rule=rule, capacity_factor=None)
        elif _ungated(layer):
            gated = {"gelu": "geglu", "silu": "swiglu"}.get(layer.activation, layer.activation)
            layer = dataclasses.replace(layer, activation=gated, bias=True)
        found.append(layer)
    blocks = [Seq(*found[i : i + 2]) for i in range(0, len(found), 2)]
    sizes = {"num_layers": len(blocks), "head_dim": spec.shape.head_dim, "imports": ()}
    return dataclasses.replace(spec, layers=segments_of(blocks), **sizes)


def _fitting(plain: ModelSpec, families: list[Family]) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that computes a spec, and its config.json."""
    for family in families:
        fields = write_config(plain, family)
        with contextlib.suppress(InputError):
            back = read_config(fields, tied=plain.head.tied, dtype=plain.dtype)
            if _plain(back) == plain:
                return family, fields
    layers, tried = ", ".join(map(str, plain.layers)), ", ".join(f.name for f in families)
    raise InputError("model.layers", layers, f"cannot be exported: no model of {tried} computes it")
