"""Reading a prepared token cache: a manifest and one zarr array of tokens per split.

A cache is a folder (or an object-store prefix such as gs://bucket/folder):

    manifest.json            written last and replaced at once; without it there is no cache
    FINGERPRINT/             what the manifest describes, named by the start of its fingerprint
        vocabulary.model     the SentencePiece model; absent for bytes
        train/ validation/   zarr v3, one dimension, uint16 or uint32, documents end to end

A cache that is prepared anew gets another folder, so whoever has this one open reads what he opened
or fails. Every document is followed by one end-of-sequence token. This file needs no TensorFlow.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from modjax.data.manifest import Manifest
from modjax.data.vocabulary import MOST_MODEL
from modjax.errors import MOST_SHOWN, InputError, SharedFault, one_line, require
from modjax.files import MOST_JSON, read_file, reason
from modjax.specs import DataConfig, ModelSpec

# An object store that does not answer is reported in a quarter of a minute, not of an hour.
FEW_RETRIES = {f"{store}_request_retries": {"max_retries": 4} for store in ("gcs", "s3", "http")}
# What tensorstore raises where a store fails or refuses.
STORE_ERRORS = (ValueError, OSError, RuntimeError)
# Decoded chunks kept in memory, so that random windows rarely decode a chunk anew.
CACHE_POOL_BYTES = 512 * 2**20


def cache_dir(data_dir: Path, data: DataConfig) -> Path:
    """Returns the folder of a corpus under a vocabulary; a model is known by its file name."""
    return Path(data_dir) / f"{data.name}-{data.vocabulary}"


def url(path: Path | str) -> str | None:
    """Returns `path` as a URL such as gs://bucket/folder, or None for a local folder."""
    found = re.fullmatch(r"([a-z][\w+.-]*):/+(.*?)/*", str(path))  # Path() folds the double slash
    if found is None:
        return None
    root = "/" if found[1] == "file" else ""
    return f"{found[1]}://{root}{found[2]}"


def shown(path: Path | str) -> str:
    """Returns `path` as a user writes it."""
    return url(path) or str(path)


def kvstore(path: Path | str, inner: str = "") -> dict[str, Any] | str:
    """Returns the tensorstore location of `path`/`inner`, a local folder or a URL."""
    folder = f"{inner}/" if inner else ""
    remote = url(path)
    if remote is not None:
        return f"{remote}/{folder}"
    return {"driver": "file", "path": f"{Path(path).absolute()}/{folder}"}


def open_store(path: Path | str) -> ts.KvStore:
    """Opens the files of `path`, a local folder or a URL."""
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
        except STORE_ERRORS as error:
            check_fingerprint(self)
            raise _damaged(self.path, str(error)) from error
        return out

    def vocabulary_model(self) -> bytes:
        """Returns the SentencePiece model of the tokens.

        Raises InputError where it is lost, or not the one that the manifest describes.
        """
        model = _read(self.path, f"{self.manifest.folder}/vocabulary.model", MOST_MODEL)
        expected = self.manifest.vocab_sha256
        if model is None or expected not in (None, hashlib.sha256(model).hexdigest()):
            check_fingerprint(self)
            fault = "has lost its" if model is None else "was made with another"
            raise _damaged(self.path, f"it {fault} vocabulary.model")
        return model


def read_manifest(path: Path | str) -> bytes | None:
    """Returns the manifest of the cache at `path`, or None where there is no cache.

    Raises InputError where that cannot be read.
    """
    return _read(path, "manifest.json", MOST_JSON)


def _read(path: Path | str, name: str, most: int) -> bytes | None:
    """Returns a file of a cache, or None where there is none; in a local folder up to `most` bytes.

    Raises InputError where it cannot be read.
    """
    try:
        if url(path) is None:  # a store would wait for a fifo
            return read_file(Path(path) / name, most)
        found = open_store(path).read(name).result()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except STORE_ERRORS as error:
        why = one_line(reason(error), MOST_SHOWN)
        raise InputError("data", shown(path), f"{name} cannot be read: {why}") from error
    return bytes(found.value) if found.state == "value" else None


def open_cache(path: Path | str) -> TokenCache:
    """Opens a prepared cache. Raises InputError where it is missing, empty or damaged."""
    found = read_manifest(path)
    if found is None:
        remedy = "no token cache here; make it with `modjax data prepare`"
        raise InputError("data", shown(path), remedy)
    manifest = parse_manifest(path, found)
    arrays: dict[str, ts.TensorStore] = {}
    cache = TokenCache(path, manifest, arrays)
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_POOL_BYTES}})
    for split, counts in manifest.splits.items():
        remedy = f"its {split} split is empty; run `modjax data prepare` with more text"
        require(counts.tokens > 0, "data", shown(path), remedy)
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(path, f"{manifest.folder}/{split}"),
            "fill_missing_data_reads": False,  # a lost file is an error, not padding
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        try:
            arrays[split] = ts.open(spec, context=context, read=True).result()
        except STORE_ERRORS as error:
            check_fingerprint(cache)
            raise _damaged(path, str(error)) from error
        if arrays[split].shape != (counts.tokens,):
            raise _damaged(path, f"{split} has shape {arrays[split].shape}")
    for split, counts in manifest.splits.items():
        cache.gather(split, [0, counts.tokens - 1], 1)
    return cache


def check_fingerprint(cache: TokenCache, expected: str | None = None) -> None:
    """Raises SharedFault unless the folder still holds the cache that was opened.

    expected: the fingerprint that it must have, such as that of a plan.
    """
    found = read_manifest(cache.path)
    where, opened = shown(cache.path), cache.manifest.fingerprint
    if found is None:
        remedy = "is gone since it was opened; make it again with `modjax data prepare`"
        raise SharedFault("data", where, remedy)
    now = parse_manifest(cache.path, found).fingerprint
    if now != opened:
        raise SharedFault(
            "data",
            where,
            f"was prepared anew since it was opened, as {now[:16]}, no longer {opened[:16]}; what "
            "began with that can't go on with this: prepare that again, or begin anew",
        )
    if expected is not None and expected != opened:
        raise SharedFault(
            "data",
            where,
            f"is {opened[:16]}, and this began with {expected[:16]}: prepare that again, or begin "
            "anew in another --workdir",
        )


def num_windows(cache: TokenCache, split: str, seq_len: int) -> int:
    """Returns the number of windows in a split: `seq_len` inputs and one more token to predict."""
    return max(0, (cache.manifest.splits[split].tokens - 1) // seq_len)


def epochs(cache: TokenCache, seq_len: int, sequences: int) -> float:
    """Returns how often training on `sequences` windows reads the training split.

    Raises InputError where the split is shorter than one window.
    """
    available = num_windows(cache, "train", seq_len)
    require(
        available > 0,
        "train.seq_len",
        seq_len,
        f"must be less than the {cache.manifest.splits['train'].tokens} training tokens of "
        f"{cache.manifest.name}",
    )
    return sequences / available


def check_epochs(cache: TokenCache, data: DataConfig, seq_len: int, sequences: int) -> None:
    """Raises InputError where training on `sequences` windows repeats data beyond the bound."""
    needed = epochs(cache, seq_len, sequences)
    require(
        needed <= data.max_epochs,
        "data.max_epochs",
        data.max_epochs,
        f"this run reads {data.name} {needed:.2f} times; allow that, or prepare more text",
    )


def check_vocab(cache: TokenCache, model: ModelSpec) -> None:
    """Raises InputError where the model has fewer embeddings than the cache has tokens."""
    require(
        model.vocab_size >= cache.manifest.vocab_size,
        "model.vocab_size",
        model.vocab_size,
        f"must be at least {cache.manifest.vocab_size}, the size of {cache.manifest.vocab}",
    )


def parse_manifest(path: Path | str, manifest: bytes) -> Manifest:
    """Returns the manifest of the cache at `path`. Raises InputError where it is damaged."""
    try:
        return Manifest.from_json(manifest)
    except (ValueError, RecursionError) as error:  # InputError is one
        raise _damaged(path, f"manifest.json: {error}") from error


def _damaged(path: Path | str, why: str) -> InputError:
    remedy = "if it is damaged, or of another version, make it again with `modjax data prepare "
    accepted = f"cannot be read; {remedy}--force` ({one_line(why, MOST_SHOWN)})"
    return InputError("data", shown(path), accepted)
