"""GGUF files of llama.cpp, opened with Hugging Face's config.json, tensor names and layouts.

llama.cpp's converter (conversion/) renames, permutes, shifts and stacks tensors. This undoes it.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes  # noqa: F401  with it, numpy knows bfloat16
import numpy as np

from modjax.data.gguf_header import read_header
from modjax.errors import InputError, describe, require
from modjax.files import damaged
from modjax.pretrained.files import Files, Index
from modjax.pretrained.gguf_config import config_of

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # others are dequantised
_AT_ONCE = 2**22  # values that are dequantised together, which takes three times their memory
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = (
    {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")}
    | {f"attn_{part}": f"self_attn.{part}" for part in ("q_norm", "k_norm")}
    | {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj"}
    | {"ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    | {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
    | {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    | {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
)
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
_OWN_NAMES = {  # by model_type
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3_text": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "mixtral": {"ffn_gate_inp": "block_sparse_moe.gate"}
    | {key: f"block_sparse_moe.experts.{{}}.{name}" for key, name in _EXPERTS.items()},
}


class _Stored(NamedTuple):
    """A tensor in a GGUF file, and how it differs from Hugging Face's tensor.

    shape: its shape in the file, with any stacked experts first.
    offset: its first byte in the file.
    expert: the index of Hugging Face's tensor in the stacked experts, or None.
    interleaved: rows per head if the two halves of each head are interleaved, otherwise 0.
    added: the constant that the converter added to each number.
    """

    path: Path
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    expert: int | None = None
    interleaved: int = 0
    added: float = 0.0

    def read(self, rows: slice) -> np.ndarray:
        """Returns a copy of some of Hugging Face's rows. Quantised ones become float32."""
        # A new map for each read, so that the pages that were read do not stay in memory.
        stored = np.memmap(self.path, np.uint8, "r", self.offset, _in_bytes(self.shape, self.kind))
        *_, width = self.shape
        if self.expert is not None:
            stored = stored[self.expert]
        if stored.ndim == 1:  # its blocks lie along its only axis
            values = _values(np.array(stored), self.kind)[self._stored_rows(width, rows)]
            return values.astype(np.float32) - np.float32(self.added) if self.added else values
        chosen = self._stored_rows(len(stored), rows)
        found = np.empty((len(chosen), width), _DTYPES.get(self.kind.name, "float32"))
        step = max(1, _AT_ONCE // width)
        for at in range(0, len(chosen), step):
            found[at : at + step] = _values(np.array(stored[chosen[at : at + step]]), self.kind)
        return found

    def _stored_rows(self, count: int, rows: slice) -> np.ndarray:
        """Returns the indices in the file of `rows`, which slice Hugging Face's `count` rows."""
        chosen = np.arange(count)[rows]
        if not self.interleaved:
            return chosen
        heads, row = np.divmod(chosen, self.interleaved)
        half, pair = np.divmod(row, self.interleaved // 2)
        return heads * self.interleaved + 2 * pair + half


def _in_bytes(shape: tuple[int, ...], kind: Any) -> tuple[int, ...]:
    """Returns the shape in bytes of a stored tensor. Raises ValueError if blocks straddle rows."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} values are not made of blocks of {block}")
    return (*shape[:-1], shape[-1] // block * size)


def _values(stored: np.ndarray, kind: Any) -> np.ndarray:
    dtype = _DTYPES.get(kind.name)
    return stored.view(dtype) if dtype else gguf.dequantize(stored, kind)


def open_gguf(path: str | Path) -> Files:
    """Opens a GGUF file, or all files of a split model. Reads no weights yet.

    path: the file, or any file of a split model.
    Tensors are read in their 16-bit type or in float32. Reading a part of one reads only its rows.
    """
    path = Path(path)
    keys, stored = _open_all(path)
    factors = {name: stored.pop(name) for name in list(stored) if name.startswith("rope_")}
    lists = {n: [_plain(x) for x in one.read(slice(None)).tolist()] for n, one in factors.items()}
    stacked = {name: one.shape for name, one in stored.items()}
    config = config_of(path, keys, stacked, lists)
    arch = keys["general.architecture"]
    found: dict[str, _Stored] = {}
    numbers: Counter[str] = Counter()
    for name, one in stored.items():
        numbers[one.kind.name] += math.prod(one.shape)
        if arch in ("llama", "smollm3") and re.search(r"\.attn_[qk]\.", name):
            one = one._replace(interleaved=config["head_dim"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            one = one._replace(added=1.0)
        named = _hf_name(name, config["model_type"])
        for expert in range(stacked[name][0]) if "{}" in named else [None]:
            own = named.format(expert)
            require(own not in found, f"{path}: {name}", own, "names two tensors")
            found[own] = one._replace(expert=expert)

    def read(name: str, index: Index) -> np.ndarray:
        rows = found[name].read(index[0])
        return rows[:, *index[1:]] if index[1:] else rows

    shapes = {n: one.shape if one.expert is None else one.shape[1:] for n, one in found.items()}
    dtype = _DTYPES.get(numbers.most_common(1)[0][0], "float32")
    return Files(str(path), config, shapes, dtype, read)


def _hf_name(name: str, model_type: str) -> str:
    """Returns Hugging Face's name, with "{}" for an expert's number. Unknown names stay."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in _BLOCK:
            own = _OWN_NAMES.get(model_type, {}).get(part, _BLOCK[part])
            return f"model.layers.{layer}.{own}.{kind}"
        case [part, kind] if part in _ENDS:
            return f"{_ENDS[part]}.{kind}"
    return name


def _open_all(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Returns the keys and the tensors of a model, which may be split into several files."""
    keys, stored = _open(path)
    count = keys.get("split.count", 1)
    if count == 1:
        return keys, stored
    name = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name)
    same = name is not None and int(name[3]) == count
    require(same, f"{path}: split.count", count, "must be the number in the names of the files")
    assert name is not None
    parts = [_open(path.with_name(f"{name[1]}{i + 1:05}{name[2]}")) for i in range(count)]
    merged = {tensor: one for _, stored in parts for tensor, one in stored.items()}
    twice = sum(len(stored) for _, stored in parts) - len(merged)
    require(not twice, str(path), twice, "tensors are in more than one part")
    return parts[0][0], merged


def _open(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Returns the keys and the tensors of one file. Raises InputError if it is damaged."""
    keys, tensors = read_header(path)
    found, end = {}, os.path.getsize(path)
    for name, (kind, shape, offset) in tensors.items():
        try:
            found[name] = one = _Stored(path, gguf.GGMLQuantizationType(kind), shape, offset)
            size = math.prod(_in_bytes(shape, one.kind))
            _values(np.zeros((1, gguf.GGML_QUANT_SIZES[one.kind][1]), np.uint8), one.kind)
        except (ValueError, LookupError, NotImplementedError) as error:
            why = f"cannot be read: {describe(error)}"
            raise InputError(f"{path}: {name}", kind, why) from error
        if offset + size > end:
            said = f"it ends at byte {end}, within {name}"
            raise damaged(path, "must be a whole GGUF file", said)
    plain = {key: _plain(value) for key, value in keys.items() if not key.startswith("tokenizer.")}
    return plain, found


def _plain(value: Any) -> Any:
    """Returns the value of a key. A list of equal values becomes one value.

    GGUF stores float32. Its shortest decimal form is the number that the model's config had.
    """
    if isinstance(value, list):
        return _plain(value[0]) if len(set(value)) == 1 else [_plain(item) for item in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value
