"""Writing of a model as a Hugging Face folder, and of its new weights as a routers file."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from modjax import __version__
from modjax.data.codecs.codec import Codec
from modjax.data.codecs.files import write_tokenizer
from modjax.errors import InputError, require
from modjax.files import write_atomically
from modjax.pretrained.config import read_config, without_training, write_config
from modjax.pretrained.families import FAMILIES, NAMES, Family
from modjax.pretrained.files import fingerprint, open_files, write_tensors
from modjax.pretrained.load import match_weights
from modjax.pretrained.tensors import (
    Slot,
    abstract,
    find_slots,
    router_slots,
    tensor_shapes,
    write_tensor,
)
from modjax.records import write_json
from modjax.specs import MLP, Attention, Layer, ModelSpec, MoE, Seq, to_dict
from modjax.specs.fields import parts
from modjax.specs.layer import segments_of
from modjax.specs.layers.dense import GATED


def save_pretrained(
    out: str | Path,
    spec: ModelSpec,
    weights: Any,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Codec | None = None,
    dtype: str | None = None,
    max_file_bytes: int = 2**31,
) -> None:
    """Writes a model as config.json and safetensors, which transformers loads.

    out: a new or empty folder.
    weights: nested dict of arrays.
    config: further fields of config.json. Its `model_type` chooses the family. Without a known
      one, the first family of modjax.pretrained.FAMILIES that can express the model is taken.
    tokenizer: written to the folder too.
    dtype: of the written tensors; None takes that of the weights.
    max_file_bytes: of a safetensors file; larger models are split.
    Raises InputError for a model that no family can express, such as one with routed layers.
    """
    out, plain = Path(out), _as_blocks(spec)
    chosen = FAMILIES.get((config or {}).get("model_type", ""))
    family, fields = _fitting(plain, [chosen] if chosen else list(FAMILIES.values()))
    out.mkdir(parents=True, exist_ok=True)
    require(not any(out.iterdir()), "out", str(out), "must be an empty folder, or a new one")
    expected = tensor_shapes(find_slots(abstract(plain), family))
    if any(map(_ungated, parts(spec, deep=True))):
        family = dataclasses.replace(family, names={**family.names, **UNGATED})
    slots: dict[str, list[Slot]] = {}
    for slot in find_slots(abstract(spec), family).values():
        slots.setdefault(slot.tensor, []).append(slot)

    def tensor(name: str) -> np.ndarray:
        if name in slots:
            return write_tensor(weights, slots[name])
        return np.full(expected[name], float(name.endswith("up_proj.bias")))  # see UNGATED

    dtype = dtype or jax.tree.leaves(weights)[0].dtype
    write_tensors(out, expected, tensor, dtype, max_file_bytes)
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    write_json(out / "config.json", {**unknown, **(config or {}), **fields})
    if tokenizer is not None:
        write_tokenizer(out, tokenizer)


def save_routers(path: str | Path, spec: ModelSpec, weights: Any, base: str | Path) -> None:
    """Writes the routers and the new weights of a model beside its pretrained base, in float32.

    weights: nested dict of arrays.
    base: the folder or GGUF file of the base.
    Raises InputError if the base has not the attentions and MLPs of the model.
    """
    from safetensors.numpy import save

    files = open_files(base)
    slots, _ = match_weights(files, spec)
    tensors = {
        name: np.ascontiguousarray(write_tensor(weights, [slot]), np.float32)
        for name, slot in router_slots(abstract(spec), slots).items()
    }
    about = {"model": to_dict(spec, defaults=False), "base": fingerprint(files)}
    # With a second entry, safetensors would write the same file in another order each time.
    entry = {"modjax": json.dumps({"version": __version__, **about})}
    write_atomically(Path(path), save(tensors, entry))


# An MLP without a gate is written as act(gate) * up, where up is 1: weights of 0 and a bias of 1.
UNGATED = {"mlp.w_in": NAMES["mlp.w_gate"]}


def _ungated(layer: Any) -> bool:
    return isinstance(layer, MLP) and layer.activation not in GATED


def _as_blocks(spec: ModelSpec) -> ModelSpec:
    """Returns an equivalent spec in which each block is an Attention and an MLP or MoE.

    Raises InputError for other layers. Fields that matter only in training are switched off.
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
        accepted += "; `modjax tune` writes tuned routers to a file beside their base"
        require(isinstance(layer, kind), "model.layers", str(layer), accepted)
        if _ungated(layer):
            gated = {"gelu": "geglu", "silu": "swiglu"}.get(layer.activation, layer.activation)
            layer = dataclasses.replace(layer, activation=gated, bias=True)
        found.append(without_training(layer))
    blocks = [Seq(*found[i : i + 2]) for i in range(0, len(found), 2)]
    sizes = {"num_layers": len(blocks), "head_dim": spec.shape.head_dim, "imports": ()}
    return dataclasses.replace(spec, layers=segments_of(blocks), **sizes)


def _fitting(plain: ModelSpec, families: list[Family]) -> tuple[Family, dict[str, Any]]:
    """Returns the first family that can express a spec, and the spec's config.json."""
    for family in families:
        fields = write_config(plain, family)
        with contextlib.suppress(InputError):
            back = read_config(fields, tied=plain.head.tied, dtype=plain.dtype)
            if _as_blocks(back) == plain:
                return family, fields
    layers, tried = ", ".join(map(str, plain.layers)), ", ".join(f.name for f in families)
    raise InputError("model.layers", layers, f"cannot be exported: no model of {tried} computes it")
