"""Files of pretrained models: a folder with config.json and safetensors, or a GGUF file.

A routers file is a safetensors file of weights that a model has beyond its pretrained base.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  with it, safetensors knows bfloat16
import numpy as np

from modjax.data.codecs.tokenizer import check_package
from modjax.errors import InputError, describe, require
from modjax.files import read_json
from modjax.records import write_json
from modjax.specs import ModelSpec, from_dict

Index = tuple[slice, ...]
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Files:
    """An opened pretrained model, with Hugging Face's tensor names and layouts.

    path: the folder or file, for error messages.
    config: the fields of config.json.
    shapes: the shape of each tensor, by name.
    dtype: the dtype that most of the stored numbers have.
    read: takes the name of a tensor and one slice per dim, and returns this part.
    """

    path: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    read: Callable[[str, Index], np.ndarray]


def open_files(path: str | Path) -> Files:
    """Opens a folder or a GGUF file. Raises InputError if it is no pretrained model, or damaged."""
    for package in ("safetensors", "gguf", "tokenizers"):
        check_package(package)
    if str(path).endswith(".gguf") and os.path.isfile(path):
        from modjax.pretrained.gguf_file import open_gguf

        return open_gguf(path)
    there = os.path.isfile(os.path.join(path, "config.json"))
    need = "must be a .gguf file, or a folder with config.json and .safetensors files"
    require(there, "pretrained", str(path), f"no pretrained model here: {need}")
    return _open_folder(Path(path))


def _open_folder(folder: Path) -> Files:
    import safetensors

    config, listed, names = _read_fields(folder / "config.json"), None, ["model.safetensors"]
    if (folder / INDEX).exists():
        listed = _read_fields(folder / INDEX).get("weight_map")
        require(isinstance(listed, dict), str(folder / INDEX), listed, "must have a weight_map")
        names = sorted({str(name) for name in listed.values()})  # type: ignore[union-attr]
    parts, numbers, seen = {}, Counter(), set()
    for file in (folder / name for name in names):
        require(file.parent == folder, str(folder / INDEX), str(file), "must be in the folder")
        try:
            opened = safetensors.safe_open(file, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            why = f"cannot be read: {describe(error)}"
            raise InputError(str(file), "unreadable", why) from error
        for name in opened.keys():
            there = listed is None or listed.get(name) == file.name
            said = f"is in {file.name}, which is not its file in the index"
            require(there, str(folder / INDEX), name, said)
            seen.add(name)
            if not name.endswith("rotary_emb.inv_freq"):  # in old files; config.json has it too
                part = opened.get_slice(name)
                parts[name] = file, name, tuple(part.get_shape())
                numbers[part.get_dtype()] += int(np.prod(part.get_shape()))
    for name in sorted((listed or {}).keys() - seen):
        raise InputError(str(folder / INDEX), name, "is in the index, but in no file")
    kind = numbers.most_common(1)[0][0] if numbers else None
    require(kind in DTYPES, str(folder), kind, f"must have tensors of {', '.join(DTYPES)}")
    if "text_config" in config:  # a decoder that also reads images; its text tensors have a prefix
        config = config["text_config"]
        images = ("vision_tower.", "multi_modal_projector.")
        own = (name for name in parts if not any(part in name for part in images))
        parts = {name.replace("language_model.", ""): parts[name] for name in own}
    shapes = {name: shape for name, (_, _, shape) in parts.items()}

    def read(name: str, index: Index) -> np.ndarray:
        # Opened for each part: what was read of a mapped file counts as memory until that closes.
        file, stored, _ = parts[name]
        with safetensors.safe_open(file, framework="numpy") as opened:
            return opened.get_slice(stored)[index]

    return Files(str(folder), config, shapes, DTYPES[str(kind)], read)


def fingerprint(files: Files) -> str:
    """Returns a hash of the name, the shape and the first row of each tensor, as stored.

    A vector is hashed whole. Returns 16 hex digits.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(files.shapes.items()):
        first = files.read(name, tuple(map(slice, (1, *shape[1:]) if shape[1:] else shape)))
        digest.update(repr((name, *map(int, shape))).encode() + first.tobytes())
    return digest.hexdigest()[:16]


def open_routers(path: str | Path, base: Files) -> tuple[ModelSpec, Files]:
    """Returns the model that a routers file describes, and the file, which reads its base, too.

    Raises InputError for another file, and for routers of another base.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            about = json.loads(opened.metadata()["modjax"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        spec, expected = from_dict(ModelSpec, about["model"], "model."), about["base"]
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        accepted = f"must be a routers file, as `modjax tune` writes it ({describe(error)})"
        raise InputError("routers", str(path), accepted) from error
    found = fingerprint(base)
    accepted = f"are routers of another base: the fingerprint of {base.path} is {found!r}"
    require(expected == found, f"{path}: base", expected, accepted)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(name: str, index: Index) -> np.ndarray:
        return tensors[name][index] if name in tensors else base.read(name, index)

    return spec, Files(str(path), base.config, shapes, "float32", read)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    max_bytes: int,
) -> None:
    """Writes safetensors, in files of at most `max_bytes` bytes; several files get an index.

    shapes: the shape of each tensor, by name.
    read: returns a tensor by its name.
    dtype: the dtype of all written tensors.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    plan = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: int(np.prod(shape)) * np.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: np.ascontiguousarray(read(name).astype(dtype)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def _read_fields(path: Path) -> dict[str, Any]:
    found = read_json(path, "must be a whole JSON file")
    require(isinstance(found, dict), str(path), found, "must be a group of fields")
    return found
