"""Token caches: a manifest and one zarr array of tokens per split.

A cache is a folder, or an object-store prefix such as gs://bucket/folder:

    manifest.json            written last, and replaced atomically; without it there is no cache
    FINGERPRINT/             named by the first 16 characters of the manifest's fingerprint
        vocabulary.model     the SentencePiece model, or tokenizer.json; neither for bytes
        train/ validation/   zarr v3, one dimension, uint16 or uint32, documents end to end

One end-of-sequence token follows every document. Preparing a cache anew makes another folder, so an
open cache reads its own tokens or fails. This module does not need TensorFlow.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from modjax.bucket import STORE_ERRORS, kvstore, open_store, shown, url
from modjax.data.codecs.codec import Codec
from modjax.data.codecs.tokenizer import MOST_CONTENT
from modjax.data.manifest import Manifest
from modjax.data.vocabulary import file_of, make_codec
from modjax.errors import MOST_SHOWN, InputError, SharedFault, one_line, require
from modjax.files import MOST_JSON, read_file, reason
from modjax.specs import DataConfig, ModelSpec

# Memory for decoded chunks, so that random windows rarely decode a chunk anew.
CACHE_POOL_BYTES = 512 * 2**20


def cache_dir(data_dir: Path, data: DataConfig) -> Path:
    """Returns the folder of a cache, DATA_DIR/NAME-VOCAB.

    VOCAB is "bytes", "sentencepiece-SIZE", or the name of a FILE.model or a tokenizer's NAME.json.
    """
    return Path(data_dir) / f"{data.name}-{data.vocabulary}"


class TokenCache:
    """An open cache: its manifest, and random access to the tokens of each split."""

    def __init__(self, path: Path | str, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._arrays: dict[str, ts.TensorStore] = {}
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_POOL_BYTES}})
        for split, counts in manifest.splits.items():
            remedy = f"its {split} split is empty; run `modjax data prepare` with more text"
            require(counts.tokens > 0, "data", shown(path), remedy)
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore(Path(path) / manifest.folder / split),
                "fill_missing_data_reads": False,  # a lost file is an error, not padding
                "recheck_cached_data": False,
                "recheck_cached_metadata": False,
            }
            with self._store_errors():
                self._arrays[split] = ts.open(spec, context=context, read=True).result()
            shape = self._arrays[split].shape
            if shape != (counts.tokens,):
                raise _damaged(path, f"{split} has shape {shape}")

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turns a store error into SharedFault if the cache was replaced, else into InputError."""
        try:
            yield
        except STORE_ERRORS as error:
            check_fingerprint(self)
            raise _damaged(self.path, str(error)) from error

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop) of a split. Raises InputError if the cache is damaged."""
        return self.gather(split, [start], stop - start)[0]

    def gather(self, split: str, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Returns tokens [start, start + length) of each start, shape (len(starts), length)."""
        array = self._arrays[split]
        out = np.empty((len(starts), length), array.dtype.numpy_dtype)
        with self._store_errors():
            # All reads start before the first is waited for.
            reads = [array[int(start) : int(start) + length].read() for start in starts]
            for row, read in zip(out, reads, strict=True):
                row[:] = read.result()
        return out

    def vocabulary(self) -> bytes:
        """Returns the file that holds the vocabulary of the tokens, or b"" for bytes.

        Raises InputError if it is lost, or is not the one that the manifest describes.
        """
        name = file_of(self.manifest.vocab)
        if name is None:
            return b""
        content = _read(self.path, f"{self.manifest.folder}/{name}", MOST_CONTENT)
        expected = self.manifest.vocab_sha256
        if content is None or expected not in (None, hashlib.sha256(content).hexdigest()):
            check_fingerprint(self)
            fault = "has lost its" if content is None else "was made with another"
            raise _damaged(self.path, f"it {fault} {name}")
        return content

    def codec(self) -> Codec:
        """Returns the codec of the tokens. Raises InputError if its file or package is missing."""
        about = self.manifest
        return make_codec(about.vocab, self.vocabulary(), about.eos_id, shown(self.path))


def open_cache(path: Path | str) -> TokenCache:
    """Opens a prepared cache. Raises InputError if it is missing, empty or damaged."""
    found = read_manifest(path)
    if found is None:
        remedy = "no token cache here; make it with `modjax data prepare`"
        raise InputError("data", shown(path), remedy)
    cache = TokenCache(path, parse_manifest(path, found))
    for split, counts in cache.manifest.splits.items():
        cache.gather(split, [0, counts.tokens - 1], 1)
    return cache


def list_caches(data_dir: Path | str) -> list[Manifest | InputError]:
    """Returns the manifest of every cache in a folder, or the error of reading it, sorted by name.

    Returns [] if there is no folder. Raises InputError if the folder cannot be read.
    """
    caches: list[Manifest | InputError] = []
    for name in _cache_names(data_dir):
        path = Path(data_dir) / name
        try:
            found = read_manifest(path)
            if found is not None:
                caches.append(parse_manifest(path, found))
        except InputError as error:
            caches.append(error)
    return caches


def _cache_names(data_dir: Path | str) -> list[str]:
    """Returns the names of the folders that may hold a cache, sorted."""
    try:
        if url(data_dir) is None:
            return sorted(name for name in os.listdir(data_dir) if not name.startswith("."))
        keys = open_store(data_dir).list().result()
    except FileNotFoundError:
        return []
    except STORE_ERRORS as error:
        why = one_line(reason(error), MOST_SHOWN)
        raise InputError("--data-dir", shown(data_dir), f"cannot be listed: {why}") from error
    found = (re.fullmatch(r"([^./][^/]*)/manifest\.json", key.decode()) for key in keys)
    return sorted(match[1] for match in found if match)


def read_manifest(path: Path | str) -> bytes | None:
    """Returns the manifest of the cache at `path`, or None if there is no cache.

    Raises InputError if the manifest cannot be read.
    """
    return _read(path, "manifest.json", MOST_JSON)


def parse_manifest(path: Path | str, manifest: bytes) -> Manifest:
    """Returns the parsed manifest of the cache at `path`. Raises InputError if it is damaged."""
    try:
        return Manifest.from_json(manifest)
    except (ValueError, RecursionError) as error:  # InputError is a ValueError
        raise _damaged(path, f"manifest.json: {error}") from error


def _read(path: Path | str, name: str, most: int) -> bytes | None:
    """Returns a file of a cache, or None if there is none. Raises InputError if it is unreadable.

    most: size limit of a local file, in bytes.
    """
    try:
        if url(path) is None:  # tensorstore would wait for a fifo
            return read_file(Path(path) / name, most)
        found = open_store(path).read(name).result()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except STORE_ERRORS as error:
        why = one_line(reason(error), MOST_SHOWN)
        raise InputError("data", shown(path), f"{name} cannot be read: {why}") from error
    return bytes(found.value) if found.state == "value" else None


def _damaged(path: Path | str, why: str) -> InputError:
    remedy = "if it is damaged, or of another version, make it again with `modjax data prepare "
    accepted = f"cannot be read; {remedy}--force` ({one_line(why, MOST_SHOWN)})"
    return InputError("data", shown(path), accepted)


def check_fingerprint(cache: TokenCache, expected: str | None = None) -> None:
    """Raises SharedFault unless the folder still holds the cache that was opened.

    expected: fingerprint that the opened cache must have, such as that of a plan; None: any.
    """
    found = read_manifest(cache.path)
    where, opened = shown(cache.path), cache.manifest.fingerprint
    if found is None:
        remedy = "is gone since it was opened; make it again with `modjax data prepare`"
        raise SharedFault("data", where, remedy)
    now = parse_manifest(cache.path, found).fingerprint
    if now != opened:
        remedy = (
            f"was prepared anew since it was opened, as {now[:16]} instead of {opened[:16]}; "
            "prepare the earlier data again, or begin anew"
        )
        raise SharedFault("data", where, remedy)
    if expected is not None and expected != opened:
        remedy = (
            f"is {opened[:16]}, but this was started with {expected[:16]}; prepare the earlier "
            "data again, or begin anew in another --workdir"
        )
        raise SharedFault("data", where, remedy)


def num_windows(cache: TokenCache, split: str, seq_len: int) -> int:
    """Returns the number of windows of seq_len + 1 tokens in a split; neighbours share a token."""
    return max(0, (cache.manifest.splits[split].tokens - 1) // seq_len)


def train_windows(cache: TokenCache, seq_len: int) -> int:
    """Returns the number of training windows. Raises InputError if there is none."""
    windows = num_windows(cache, "train", seq_len)
    tokens, name = cache.manifest.splits["train"].tokens, cache.manifest.name
    accepted = f"must be less than the {tokens} training tokens of {name}"
    require(windows > 0, "train.seq_len", seq_len, accepted)
    return windows


def epochs(cache: TokenCache, seq_len: int, sequences: int) -> float:
    """Returns the (fractional) number of epochs in training on `sequences` windows.

    Raises InputError if the split is shorter than one window.
    """
    return sequences / train_windows(cache, seq_len)


def check_epochs(cache: TokenCache, data: DataConfig, seq_len: int, sequences: int) -> None:
    """Raises InputError if training on `sequences` windows exceeds `data.max_epochs`."""
    needed = epochs(cache, seq_len, sequences)
    remedy = f"this run reads {data.name} {needed:.2f} times; allow that, or prepare more text"
    require(needed <= data.max_epochs, "data.max_epochs", data.max_epochs, remedy)


def check_vocab(cache: TokenCache, model: ModelSpec) -> None:
    """Raises InputError if the model has fewer embeddings than the cache has token ids."""
    size, vocab = cache.manifest.vocab_size, cache.manifest.vocab
    accepted = f"must be at least {size}, the size of {vocab}"
    require(model.vocab_size >= size, "model.vocab_size", model.vocab_size, accepted)
