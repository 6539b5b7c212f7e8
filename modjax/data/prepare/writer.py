"""Writing token arrays shard by shard, with a journal to go on from after a kill."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tensorstore as ts

from modjax.data.cache import kvstore
from modjax.data.manifest import SPLITS
from modjax.files import MOST_JSON, read_file, write_atomically
from modjax.specs import from_dict

CHUNK = 2**15  # tokens decoded together when a window is read
SHARD = 2**22  # tokens in a file
UNBOUNDED = 2**50  # the length of an array whose end is not known yet


@dataclass(frozen=True)
class Written:
    """Progress of a split: whole shards only, until it is done.

    documents and bytes count the documents that are wholly stored; `within` tokens of the next
    one are stored too. digest chains the sha256 of each shard with that of those before it.
    """

    documents: int = 0
    within: int = 0
    tokens: int = 0
    bytes: int = 0
    digest: str = ""
    done: bool = False


def read_journal(folder: Path, request: str) -> dict[str, Written]:
    """Returns how far an earlier run has come in `folder`.

    Empties the folder where that run was for another `request`.
    """
    found = _journal(folder)
    if found is not None and found[0] == request:
        return found[1]
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    return dict.fromkeys(SPLITS, Written())


def has_tokens(folder: Path) -> bool:
    """Returns whether a later run could go on from what is in `folder`."""
    found = _journal(folder)
    return found is not None and any(one.tokens for one in found[1].values())


def _journal(folder: Path) -> tuple[str, dict[str, Written]] | None:
    """Returns the request and the state of each split; None where there is no whole journal."""
    try:
        journal = json.loads(read_file(folder / "journal.json", MOST_JSON))
        splits = {split: from_dict(Written, journal["splits"][split]) for split in SPLITS}
        return journal["request"], splits
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_journal(folder: Path, request: str, written: dict[str, Written]) -> None:
    splits = {split: asdict(one) for split, one in written.items()}
    write_atomically(folder / "journal.json", json.dumps({"request": request, "splits": splits}))


def write_split(
    folder: Path,
    documents: Iterable[tuple[np.ndarray, int]],
    dtype: np.dtype,
    start: Written,
    save: Callable[[Written], None],
) -> Written:
    """Appends documents (tokens, bytes of text) end to end to the array in `folder`.

    `documents` begins after the first `start.documents`; `save` is told of every full shard.
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
                save(replace(now, within=position))
        now = replace(now, documents=now.documents + 1, bytes=now.bytes + int(size))
    if filled:
        now = flush()
    array.resize(exclusive_max=[now.tokens], resize_metadata_only=True).result()
    return replace(now, done=True)


def _open(folder: Path, dtype: np.dtype, fresh: bool) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": kvstore(folder)}
    if not fresh:
        array = ts.open(spec, open=True).result()
        return array.resize(exclusive_max=[UNBOUNDED], resize_metadata_only=True).result()
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    spec["metadata"] = {
        "shape": [UNBOUNDED],
        "data_type": dtype.name,
        "fill_value": int(np.iinfo(dtype).max),
        "dimension_names": ["token"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {"chunk_shape": [CHUNK], "codecs": inner},
            }
        ],
    }
    return ts.open(spec, create=True, delete_existing=True).result()
