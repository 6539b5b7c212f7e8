"""Batches as pure functions of (seed, step), read from a token cache.

Shapes: B batch (sequences), L positions.

Window i covers tokens [i * L, i * L + L]: L inputs and, shifted by one, L targets. Every epoch
visits all windows once, in an order drawn from (seed, epoch).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from modjax.data.cache import TokenCache, epochs, num_windows
from modjax.errors import require

ROUNDS = 8


class Batch(NamedTuple):
    """int32 inputs and targets; segment ids count documents from 1 within the window.

    An eos belongs to the document that it ends. weights_BL is float32; where it is 0 the
    position is padding, is not scored, and has segment id 0.
    """

    inputs_BL: np.ndarray
    targets_BL: np.ndarray
    segment_ids_BL: np.ndarray
    weights_BL: np.ndarray


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each `index` in [0, size) goes under the permutation drawn from (seed, epoch).

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
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_batch(cache: TokenCache, *, seq_len: int, batch_size: int, seed: int, step: int) -> Batch:
    """The training batch of a step: sequences [step * B, step * B + B) of the endless order.

    Raises InputError where the training split is shorter than one window.
    """
    epochs(cache, seq_len, batch_size)  # refuses a split without a window
    size = num_windows(cache, "train", seq_len)
    epoch_B, index_B = np.divmod(step * batch_size + np.arange(batch_size), size)
    window_B = np.empty(batch_size, np.int64)
    for epoch in np.unique(epoch_B):
        rows = epoch_B == epoch
        window_B[rows] = permute(index_B[rows], size, seed, int(epoch))
    return _read(cache, "train", window_B, seq_len)


def eval_batches(
    cache: TokenCache, *, seq_len: int, batch_size: int, sequences: int
) -> Iterator[Batch]:
    """A fixed set of `sequences` validation windows, spread evenly over the split.

    The last batch is filled up with rows of weight 0. Raises InputError, before the first batch,
    where the split has fewer windows.
    """
    size = num_windows(cache, "validation", seq_len)
    require(
        sequences <= size,
        "train.eval_sequences",
        sequences,
        f"the validation split of {cache.manifest.name} has {size} windows of "
        f"{seq_len} tokens; ask for at most that many",
    )
    windows = np.arange(sequences) * size // sequences

    def batches() -> Iterator[Batch]:
        for start in range(0, sequences, batch_size):
            batch = _read(cache, "validation", windows[start : start + batch_size], seq_len)
            missing = batch_size - len(batch.inputs_BL)
            yield Batch(*(np.pad(x_BL, ((0, missing), (0, 0))) for x_BL in batch))

    return batches()


def _read(cache: TokenCache, split: str, window_B: np.ndarray, seq_len: int) -> Batch:
    tokens = cache.gather(split, window_B * seq_len, seq_len + 1)
    inputs_BL = tokens[:, :-1].astype(np.int32)
    targets_BL = tokens[:, 1:].astype(np.int32)
    ends_BL = (inputs_BL == cache.manifest.eos_id).astype(np.int32)
    segment_ids_BL = 1 + np.cumsum(ends_BL, axis=1, dtype=np.int32) - ends_BL
    return Batch(inputs_BL, targets_BL, segment_ids_BL, np.ones(inputs_BL.shape, np.float32))
