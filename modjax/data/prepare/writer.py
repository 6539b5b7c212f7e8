"""A writer of token arrays, shard by shard, with a journal to resume from after a kill."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tensorstore as ts

from modjax.bucket import kvstore
from modjax.data.manifest import SPLITS
from modjax.files import MOST_JSON, read_file, write_atomically
from modjax.specs import from_dict

CHUNK = 2**15  # tokens, the unit of decoding
SHARD = 2**22  # tokens in a file
UNBOUNDED = 2**50  # length of an array before its end is known


@dataclass(frozen=True)
class Written:
    """Progress of a split. Counts whole shards only, until the split is done.

    documents: number of documents that are wholly stored.
    bytes: size of their text in UTF-8.
    within: number of stored tokens of the next document, which is stored in part.
    tokens: number of all stored tokens.
    digest: chained sha256 of the shards: each of the previous digest and the shard.
    done: whether the whole split is stored.
    """

    documents: int = 0
    within: int = 0
    tokens: int = 0
    bytes: int = 0
    digest: str = ""
    done: bool = False


def read_journal(folder: Path, request: str) -> dict[str, Written]:
    """Returns the progress of each split in `folder`.

    Empties the folder if its journal is missing, damaged or of another `request`, which is a
    description by `Request.inputs`.
    """
    found = _journal(folder)
    if found is not None and found[0] == request:
        return found[1]
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    return dict.fromkeys(SPLITS, Written())


def has_tokens(folder: Path) -> bool:
    """Returns whether `folder` holds tokens from which a later preparation can resume."""
    found = _journal(folder)
    return found is not None and any(written.tokens for written in found[1].values())


def _journal(folder: Path) -> tuple[str, dict[str, Written]] | None:
    """Returns the request and the progress of each split, or None if there is no whole journal."""
    try:
        journal = json.loads(read_file(folder / "journal.json", MOST_JSON))
        splits = {split: from_dict(Written, journal["splits"][split]) for split in SPLITS}
        return journal["request"], splits
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_journal(folder: Path, request: str, splits: dict[str, Written]) -> None:
    journal = {"request": request, "splits": {name: asdict(w) for name, w in splits.items()}}
    write_atomically(folder / "journal.json", json.dumps(journal))


def write_split(
    folder: Path, documents: Iterable[tuple[np.ndarray, int]], dtype: np.dtype, start: Written
) -> Iterator[Written]:
    """Appends documents (tokens, bytes of text) end to end to the array in `folder`.

    Yields the progress after every full shard, and at the end. `documents` leaves out the first
    `start.documents`, which are stored.
    """
    array = _open(folder, dtype, fresh=start.tokens == 0)
    buffer = np.empty(SHARD, dtype)
    filled = 0
    now = start

    def flush() -> Written:
        content = buffer[:filled]
        array[now.tokens : now.tokens + filled].write(content).result()
        digest = hashlib.sha256(now.digest.encode() + content.tobytes()).hexdigest()
        return replace(now, tokens=now.tokens + filled, digest=digest)

    for tokens, size in documents:
        position, now = now.within, replace(now, within=0)
        while position < len(tokens):
            count = min(SHARD - filled, len(tokens) - position)
            buffer[filled : filled + count] = tokens[position : position + count]
            filled += count
            position += count
            if filled == SHARD:
                now = flush()
                filled = 0
                yield replace(now, within=position)
        now = replace(now, documents=now.documents + 1, bytes=now.bytes + int(size))
    if filled:
        now = flush()
    array.resize(exclusive_max=[now.tokens], resize_metadata_only=True).result()
    yield replace(now, done=True)


def _open(folder: Path, dtype: np.dtype, fresh: bool) -> ts.TensorStore:
    """Opens an array of unbounded length. fresh: creates it, deleting what is there."""
    spec = {"driver": "zarr3", "kvstore": kvstore(folder)}
    if not fresh:
        array = ts.open(spec, open=True).result()
        return array.resize(exclusive_max=[UNBOUNDED], resize_metadata_only=True).result()
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    sharding = {"chunk_shape": [CHUNK], "codecs": inner}
    metadata = {
        "shape": [UNBOUNDED],
        "data_type": dtype.name,
        "fill_value": int(np.iinfo(dtype).max),
        "dimension_names": ["token"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return ts.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()
