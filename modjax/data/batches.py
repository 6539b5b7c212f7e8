"""Batches as pure functions of (seed, step), read from a token cache.

Legend: B batch (sequences), L positions.

Window i holds the L + 1 tokens from i * L on: all but the last are inputs, all but the first are
targets. Every epoch visits all windows once, in an order drawn from (seed, epoch).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from modjax.data.token_cache import TokenCache, num_windows, train_windows
from modjax.errors import require

ROUNDS = 8


class Batch(NamedTuple):
    """Windows of a token cache.

    inputs_BL, targets_BL: int32 tokens.
    segment_ids_BL: int32 number of the document within the window, from 1. An eos belongs to the
        document that it ends. 0 for padding.
    weights_BL: float32 weight of each target in the loss. 0 for padding.
    """

    inputs_BL: np.ndarray
    targets_BL: np.ndarray
    segment_ids_BL: np.ndarray
    weights_BL: np.ndarray


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the image of each `index` in [0, size) under a permutation drawn from (seed, epoch).

    A Feistel network on the smallest even number of bits that holds `size`, applied again until
    the result falls below it (cycle walking: Black and Rogaway 2002, Ciphers with arbitrary
    finite domains). Memory does not grow with `size`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
    walked = np.asarray(index, np.uint64).copy()
    outside = np.arange(len(walked))
    while len(outside):
        left, right = walked[outside] >> half, walked[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        walked[outside] = (left << half) | right
        outside = outside[walked[outside] >= size]
    return walked.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_batch(
    cache: TokenCache,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
) -> Batch:
    """Returns the training batch of a step: windows [step * B, step * B + B) in training order.

    Training order is that of epoch 0, then epoch 1, and so on; a batch may span two epochs.
    rows: rows of the batch to read; None reads all.
    Raises InputError if the training split is shorter than one window.
    """
    size = train_windows(cache, seq_len)
    row_B = np.arange(batch_size) if rows is None else rows
    epoch_B, index_B = np.divmod(step * batch_size + row_B, size)
    window_B = np.empty(len(row_B), np.int64)
    for epoch in np.unique(epoch_B):
        chosen = epoch_B == epoch
        window_B[chosen] = permute(index_B[chosen], size, seed, int(epoch))
    return _read(cache, "train", window_B, seq_len)


def eval_batches(
    cache: TokenCache,
    *,
    seq_len: int,
    batch_size: int,
    sequences: int,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Returns batches of a fixed set of `sequences` validation windows, spread over the split.

    The last batch is padded to `batch_size` rows. Raises InputError, at the call and not at the
    first batch, if the split has fewer windows.
    rows: rows of each batch to read, sorted; None reads all.
    """
    size = num_windows(cache, "validation", seq_len)
    accepted = (
        f"the validation split of {cache.manifest.name} has {size} windows of {seq_len} tokens; "
        "ask for at most that many"
    )
    require(sequences <= size, "train.eval_sequences", sequences, accepted)
    windows = np.arange(sequences) * size // sequences
    row_B = np.arange(batch_size) if rows is None else rows

    def batches() -> Iterator[Batch]:
        for start in range(0, sequences, batch_size):
            there = start + row_B[start + row_B < sequences]
            batch = _read(cache, "validation", windows[there], seq_len)
            missing = len(row_B) - len(there)
            yield Batch(*(np.pad(x_BL, ((0, missing), (0, 0))) for x_BL in batch))

    return batches()


def _read(cache: TokenCache, split: str, window_B: np.ndarray, seq_len: int) -> Batch:
    tokens = cache.gather(split, window_B * seq_len, seq_len + 1)
    inputs_BL = tokens[:, :-1].astype(np.int32)
    targets_BL = tokens[:, 1:].astype(np.int32)
    ends_BL = (inputs_BL == cache.manifest.eos_id).astype(np.int32)
    segment_ids_BL = 1 + np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL
    return Batch(inputs_BL, targets_BL, segment_ids_BL, np.ones(inputs_BL.shape, np.float32))
