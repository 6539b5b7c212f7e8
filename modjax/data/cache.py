"""Reading a prepared token cache: a manifest and one zarr array of tokens per split.

A cache is a folder (or an object-store prefix such as gs://bucket/folder):

    manifest.json        written last; without it there is no cache
    vocabulary.model     the SentencePiece model; absent for bytes
    train/ validation/   zarr v3, one dimension, uint16 or uint32, documents end to end

Every document is followed by one end-of-sequence token. This file needs no TensorFlow.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from modjax.config import DataConfig, InputError, ModelConfig, SharedFault, from_dict, require

FORMAT = 1
SPLITS = ("train", "validation")
# An object store that does not answer is reported in a quarter of a minute, not of an hour.
FEW_RETRIES = {f"{store}_request_retries": {"max_retries": 4} for store in ("gcs", "s3", "http")}
# Decoded chunks kept in memory, so that random windows rarely decode a chunk anew.
CACHE_POOL_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Split:
    """What a split holds: `bytes` of UTF-8 text; `tokens` with the one eos of each document."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    vocab: as in `DataConfig.vocab`. source: where the text came from, with a hash of it.
    fingerprint: sha256 over the token streams and the vocabulary; equal exactly when those are.
    """

    name: str
    vocab: str
    vocab_size: int
    eos_id: int
    source: str
    fingerprint: str
    splits: dict[str, Split]
    format: int = FORMAT

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Raises InputError or ValueError where `text` is no manifest of this format."""
        values = json.loads(text)
        require(isinstance(values, dict), "manifest", values, "must be a group of fields")
        require(values.get("format") == FORMAT, "manifest.format", values.get("format"),
                f"this version reads format {FORMAT}")  # fmt: skip
        splits = values.pop("splits", None)
        require(isinstance(splits, dict) and set(splits) == set(SPLITS), "manifest.splits", splits,
                f"must describe {' and '.join(SPLITS)}")  # fmt: skip
        named = {name: from_dict(Split, splits[name], f"{name}.") for name in SPLITS}
        return from_dict(cls, {**values, "splits": named})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def cache_dir(data_dir: Path, data: DataConfig) -> Path:
    """The folder of a corpus under a vocabulary; a vocabulary file counts by its file name."""
    return Path(data_dir) / f"{data.name}-{Path(data.vocab).name.replace(':', '-')}"


def url(path: Path | str) -> str | None:
    """The URL that `path` is, such as gs://bucket/folder, or None where it is a local folder."""
    found = re.fullmatch(r"([a-z][\w+.-]*):/+(.*?)/*", str(path))  # Path() folds the double slash
    if found is None:
        return None
    root = "/" if found[1] == "file" else ""
    return f"{found[1]}://{root}{found[2]}"


def shown(path: Path | str) -> str:
    """`path` as one writes it."""
    return url(path) or str(path)


def kvstore(path: Path | str, inner: str = "") -> dict[str, Any] | str:
    """The tensorstore location of `path`/`inner`, a local folder or a URL."""
    folder = f"{inner}/" if inner else ""
    remote = url(path)
    if remote is not None:
        return f"{remote}/{folder}"
    return {"driver": "file", "path": f"{Path(path).absolute()}/{folder}"}


def open_store(path: Path | str) -> ts.KvStore:
    """The files of `path`, a local folder or a URL."""
    return ts.KvStore.open(kvstore(path), context=ts.Context(FEW_RETRIES)).result()


class TokenCache:
    """An open cache: its manifest, and random access to the tokens of each split."""

    def __init__(self, path: Path | str, manifest: Manifest, arrays: dict[str, ts.TensorStore]):
        self.path = path
        self.manifest = manifest
        self._arrays = arrays

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a split. Raises InputError where the cache is damaged."""
        return self.gather(split, [start], stop - start)[0]

    def gather(self, split: str, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each start, read together: (len(starts), length)."""
        array = self._arrays[split]
        out = np.empty((len(starts), length), array.dtype.numpy_dtype)
        try:
            reads = [array[int(start) : int(start) + length].read() for start in starts]
            for row, read in zip(out, reads, strict=True):
                row[:] = read.result()
        except (ValueError, OSError) as error:
            raise _damaged(self.path, str(error)) from error
        return out


def read_manifest(path: Path | str) -> bytes | None:
    """The manifest of the cache at `path`, or None where there is no cache.

    Raises InputError for a URL that cannot be read.
    """
    try:
        found = open_store(path).read("manifest.json").result()
    except (ValueError, OSError) as error:
        where = shown(path)
        raise InputError("data", where, f"cannot be read: {one_line(error)}") from error
    return found.value if found.state == "value" else None


def open_cache(path: Path | str) -> TokenCache:
    """Opens a prepared cache. Raises InputError where it is missing, empty or damaged."""
    found = read_manifest(path)
    if found is None:
        remedy = "no token cache here; make it with `modjax data prepare`"
        raise InputError("data", shown(path), remedy)
    try:
        manifest = Manifest.from_json(found)
    except (InputError, ValueError) as error:
        raise _damaged(path, f"manifest.json: {error}") from error

    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_POOL_BYTES}})
    arrays = {}
    for split, counts in manifest.splits.items():
        remedy = f"its {split} split is empty; run `modjax data prepare` with more text"
        require(counts.tokens > 0, "data", shown(path), remedy)
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(path, split),
            "fill_missing_data_reads": False,  # a lost file is an error, not padding
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        try:
            arrays[split] = ts.open(spec, context=context, read=True).result()
        except (ValueError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if arrays[split].shape != (counts.tokens,):
            raise _damaged(path, f"{split} has shape {arrays[split].shape}")
    cache = TokenCache(path, manifest, arrays)
    for split, counts in manifest.splits.items():
        cache.gather(split, [0, counts.tokens - 1], 1)
    return cache


def check_fingerprint(cache: TokenCache, expected: str | None = None) -> None:
    """Raises SharedFault where the place of `cache` does not hold it, or not the `expected` one."""
    found = Manifest.from_json(read_manifest(cache.path) or b"").fingerprint
    for wanted in (cache.manifest.fingerprint, expected):
        if wanted is not None and wanted != found:
            raise SharedFault("data", shown(cache.path), "was prepared anew since")


def describe(data_dir: Path) -> list[Manifest]:
    """The manifests of every cache in a folder, by name; [] where there is none."""
    manifests = []
    for name in _cache_names(data_dir):
        path = Path(data_dir) / name
        try:
            manifests.append(Manifest.from_json(read_manifest(path) or b""))
        except ValueError as error:  # InputError is one
            raise _damaged(path, str(error)) from error
    return manifests


def _cache_names(data_dir: Path | str) -> list[str]:
    if url(data_dir) is None:
        return sorted(path.parent.name for path in Path(data_dir).glob("[!.]*/manifest.json"))
    try:
        keys = open_store(data_dir).list().result()
    except (ValueError, OSError, RuntimeError) as error:
        where = shown(data_dir)
        raise InputError("--data-dir", where, f"cannot be listed: {one_line(error)}") from error
    found = (re.fullmatch(r"([^./][^/]*)/manifest\.json", key.decode()) for key in keys)
    return sorted(match[1] for match in found if match)


def num_windows(cache: TokenCache, split: str, seq_len: int) -> int:
    """How many windows of `seq_len` inputs, each with one more token to predict, a split holds."""
    return max(0, (cache.manifest.splits[split].tokens - 1) // seq_len)


def epochs(cache: TokenCache, seq_len: int, sequences: int) -> float:
    """How often training on `sequences` windows reads the training split.

    Raises InputError where the split is shorter than one window.
    """
    available = num_windows(cache, "train", seq_len)
    require(available > 0, "train.seq_len", seq_len,
            f"must be less than the {cache.manifest.splits['train'].tokens} training tokens of "
            f"{cache.manifest.name}")  # fmt: skip
    return sequences / available


def check_epochs(cache: TokenCache, data: DataConfig, seq_len: int, sequences: int) -> None:
    """Raises InputError where training on `sequences` windows repeats data beyond the bound."""
    needed = epochs(cache, seq_len, sequences)
    require(needed <= data.max_epochs, "data.max_epochs", data.max_epochs,
            f"this run reads {data.name} {needed:.2f} times; allow that, or prepare "
            f"more text")  # fmt: skip


def check_vocab(cache: TokenCache, model: ModelConfig) -> None:
    """Raises InputError where the model has fewer embeddings than the cache has tokens."""
    require(model.vocab_size >= cache.manifest.vocab_size, "model.vocab_size", model.vocab_size,
            f"must be at least {cache.manifest.vocab_size}, the size of "
            f"{cache.manifest.vocab}")  # fmt: skip


def bits_per_byte(manifest: Manifest, loss: float, split: str = "validation") -> float:
    """A mean loss in nats per token, as bits per UTF-8 byte of text: loss * tokens / bytes / ln 2.

    Tokens include the one eos of each document, since the loss does: knowing where a text ends
    is part of predicting it. Bytes are those of the text alone. The extra token is the same for
    every vocabulary, so figures compare across vocabularies.
    """
    counts = manifest.splits[split]
    return loss * counts.tokens / counts.bytes / math.log(2)


def one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:200]


def _damaged(path: Path | str, why: str) -> InputError:
    remedy = "cannot be read; if it is damaged, make it again with `modjax data prepare --force`"
    return InputError("data", shown(path), f"{remedy} ({one_line(why)})")
