"""GGUF files, the format of llama.cpp, as checkpoints with Hugging Face's config, names and shapes.

llama.cpp's converter (conversion/) renames, permutes, shifts and stacks tensors. This undoes it.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from modjax import files
from modjax.errors import describe, require
from modjax.pretrained.gguf_config import config_of

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}  # the other types are read as float32
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
    """A tensor in a file, and how it differs from Hugging Face's."""

    path: Path
    tensor: Any  # gguf.ReaderTensor
    expert: int | None = None  # its index in a stack of experts
    interleaved: int = 0  # the width of heads whose two halves are interleaved, if they are
    offset: float = 0.0  # what was added

    def shape(self) -> tuple[int, ...]:
        shape = tuple(reversed(self.tensor.shape.tolist()))
        return shape if self.expert is None else shape[1:]

    def read(self, rows: slice) -> np.ndarray:
        """Returns a copy of some rows, dequantised to float32 if they are quantised."""
        import gguf

        kind, data = self.tensor.tensor_type, self.tensor.data
        # A new map for each read, so that the pages that were read do not stay in memory.
        stored = np.memmap(self.path, data.dtype, "r", int(self.tensor.data_offset), data.shape)
        stored = stored if self.expert is None else stored[self.expert]
        chosen = rows
        if self.interleaved:
            heads, row = np.divmod(np.arange(self.shape()[0])[rows], self.interleaved)
            half, pair = np.divmod(row, self.interleaved // 2)
            chosen = heads * self.interleaved + 2 * pair + half
        # Blocks lie along the last axis, so that rows of matrices can be chosen first.
        values = np.array(stored[chosen] if stored.ndim > 1 else stored)
        if kind == gguf.GGMLQuantizationType.BF16:
            values = values.view(ml_dtypes.bfloat16)
        elif values.dtype == np.uint8:
            values = gguf.dequantize(values, kind)
        values = values if stored.ndim > 1 else values[chosen]
        return values.astype(np.float32) - np.float32(self.offset) if self.offset else values


@dataclass(frozen=True)
class Files:
    """An opened pretrained model, with Hugging Face's names and layouts.

    path: where it is.
    config: the content of config.json.
    shapes: of all tensors, by name.
    dtype: in which most of the numbers are read.
    read: returns a part of a tensor, by its name and one slice per dim.
    """

    path: str
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    read: Callable[[str, tuple[slice, ...]], np.ndarray]


def open_gguf(path: str | Path) -> Files:
    """Opens a GGUF file, or all files of a split model. Reads their headers only.

    Tensors are read in float32, or in the 16-bit type of the file. Reading a part of a tensor reads
    only its rows.
    """
    path = Path(path)
    keys, stored = _open_all(path)
    factors = {name: stored.pop(name) for name in list(stored) if name.startswith("rope_")}
    lists = {n: [_plain(x) for x in one.read(slice(None)).tolist()] for n, one in factors.items()}
    stacked = {name: one.shape() for name, one in stored.items()}
    config = config_of(path, keys, stacked, lists)
    arch = keys["general.architecture"]
    found: dict[str, _Stored] = {}
    numbers: Counter[str] = Counter()
    for name, one in stored.items():
        numbers[one.tensor.tensor_type.name] += one.tensor.n_elements
        if arch in ("llama", "smollm3") and re.search(r"\.attn_[qk]\.", name):
            one = one._replace(interleaved=config["head_dim"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            one = one._replace(offset=1.0)
        named = _name(name, config["model_type"])
        for expert in range(stacked[name][0]) if "{}" in named else [None]:
            own = named.format(expert)
            require(own not in found, f"{path}: {name}", own, "names two tensors")
            found[own] = one._replace(expert=expert)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows = found[name].read(index[0])
        return rows[:, *index[1:]] if index[1:] else rows

    shapes = {name: one.shape() for name, one in found.items()}
    dtype = _DTYPES.get(numbers.most_common(1)[0][0], "float32")
    return Files(str(path), config, shapes, dtype, read)


def _name(name: str, model_type: str) -> str:
    """Returns Hugging Face's name, with "{}" for the expert, or `name` if it is unknown."""
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


@np.errstate(over="raise")
def _open(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Returns the keys and the tensors of a file. Raises InputError unless it is whole."""
    installed = importlib.util.find_spec("gguf") is not None
    require(installed, "gguf", None, "missing package; pip install -e '.[pretrained]'")
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            # Otherwise the reader counts up to any number that a damaged header names.
            if offset + int(count) * np.dtype(dtype).itemsize > self.data.size:
                raise EOFError(f"it ends at byte {self.data.size}, within its header or a tensor")
            return super()._get(offset, dtype, count, *args, **kwargs)

    try:
        with files.open_file(path) as file:
            start = file.read(8)
    except (OSError, ValueError) as error:
        raise files.damaged(path, "must be a GGUF file", files.reason(error)) from error
    require(start[:4] == b"GGUF", str(path), start[:4], "must begin with b'GGUF', as GGUF files do")
    version = int.from_bytes(start[4:], "little")
    require(version in (2, 3), f"{path}: version", version, "must be 2 or 3, and little-endian")
    try:
        reader = Reader(path)
        for kind in {tensor.tensor_type for tensor in reader.tensors}:
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
            gguf.dequantize(block, kind)  # raises for a kind that it does not know
        wanted = {k: v for k, v in reader.fields.items() if not k.startswith("tokenizer.")}
        keys = {key: _plain(field.contents()) for key, field in wanted.items()}
        return keys, {tensor.name: _Stored(path, tensor) for tensor in reader.tensors}
    except Exception as error:  # the reader checks nothing, so damage raises any error
        raise files.damaged(path, "must be a whole GGUF file", describe(error)) from error


def _plain(value: Any) -> Any:
    """Returns the value of a key: one for all layers if they agree, floats in their short form.

    GGUF stores float32. Its shortest decimal form is the number that the model's config had.
    """
    if isinstance(value, list):
        return _plain(value[0]) if len(set(value)) == 1 else [_plain(item) for item in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value
