import numpy as np
import pytest

from modjax.data.batches import Batch, eval_batches, permute, train_batch
from modjax.data.token_cache import num_windows, open_cache
from modjax.errors import InputError


@pytest.fixture
def counting(make_cache):
    """A cache whose n-th token is n + 2, so that a batch shows where it was read."""
    return open_cache(
        make_cache(
            np.arange(2, 2 + 7 * 8 + 3),
            np.arange(2, 2 + 11 * 8 + 1),
            vocab_size=100,
            dtype=np.uint32,
        )
    )


def windows(batch: Batch) -> list[int]:
    return ((batch.inputs_BL[:, 0] - 2) // 8).tolist()


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 4096, 65_537])
def test_permute_is_a_bijection(size):
    permuted = permute(np.arange(size), size, seed=3, epoch=1)
    np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


def test_permute_depends_on_seed_and_on_epoch():
    orders = {tuple(permute(np.arange(50), 50, s, e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_permute_sends_every_index_everywhere_equally_often():
    size, seeds = 10, 3000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), permute(np.arange(size), size, seed, 0)] += 1
    chi_squared = ((counts - seeds / size) ** 2 / (seeds / size)).sum(axis=1)
    assert chi_squared.max() < 33.7  # 99.99% of chi-squared with 9 degrees of freedom


def test_permute_leaves_neighbours_no_closer_than_strangers():
    permuted = permute(np.arange(20_000), 20_000, 0, 0)
    # For a uniform permutation the mean distance of two values is n / 3.
    assert abs(np.abs(np.diff(permuted)).mean() / 20_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(20_000), permuted)[0, 1]) < 0.03


def test_permute_needs_no_memory_for_a_corpus_of_any_size():
    size = 10**14 + 7
    index = np.array([0, 1, size // 2, size - 1])
    permuted = permute(index, size, 0, 0)
    assert len(set(permuted.tolist())) == 4
    assert permuted.min() >= 0 and permuted.max() < size


def test_a_window_is_its_tokens_and_targets_are_inputs_shifted_by_one(counting):
    batch = train_batch(counting, seq_len=8, batch_size=7, seed=0, step=0)
    assert sorted(windows(batch)) == list(range(7))
    for row, window in enumerate(windows(batch)):
        start = 2 + window * 8
        np.testing.assert_array_equal(batch.inputs_BL[row], np.arange(start, start + 8))
        np.testing.assert_array_equal(batch.targets_BL[row], np.arange(start + 1, start + 9))
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.int32, np.float32]
    assert (batch.weights_BL == 1).all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 20])
def test_batches_cross_epochs_and_every_epoch_reads_each_window_once(counting, batch_size):
    steps = -(-7 * 6 // batch_size)
    read = []
    for step in range(steps):
        read += windows(train_batch(counting, seq_len=8, batch_size=batch_size, seed=5, step=step))
    orders = [tuple(read[7 * epoch : 7 * epoch + 7]) for epoch in range(6)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) > 1


def test_the_order_of_sequences_does_not_depend_on_the_batch_size(counting):
    def order(batch_size):
        return [
            window
            for step in range(24 // batch_size)
            for window in windows(
                train_batch(counting, seq_len=8, batch_size=batch_size, seed=1, step=step)
            )
        ]

    assert order(4) == order(6) == order(24)


def test_some_rows_of_a_batch_are_those_of_the_whole_batch(counting):
    rows, arguments = np.array([1, 2, 4]), dict(seq_len=8, batch_size=5)
    for step in range(3):  # the second batch spans two epochs
        whole = train_batch(counting, **arguments, seed=3, step=step)
        part = train_batch(counting, **arguments, seed=3, step=step, rows=rows)
        for one, other in zip(part, whole, strict=True):
            np.testing.assert_array_equal(one, other[rows])
    # Of the last batch, only the first row is there: this part of it is all padding.
    whole, part = (
        list(eval_batches(counting, **arguments, sequences=11, rows=r)) for r in (None, rows)
    )
    assert len(whole) == 3
    for ours, theirs in zip(part, whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other[rows])


def test_a_batch_is_a_function_of_seed_and_step_alone(make_cache):
    rng = np.random.default_rng(0)
    path = make_cache(rng.integers(1, 259, 10_000), rng.integers(1, 259, 1_000))
    arguments = dict(seq_len=32, batch_size=4, seed=7)
    first = open_cache(path)
    batches = [train_batch(first, **arguments, step=step) for step in range(6)]
    again = train_batch(open_cache(path), **arguments, step=5)
    for one, other in zip(batches[5], again, strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed = train_batch(first, seq_len=32, batch_size=4, seed=8, step=5)
    assert (other_seed.inputs_BL != again.inputs_BL).any()


def test_segment_ids_count_documents_and_an_eos_belongs_to_the_one_it_ends(make_cache):
    rng = np.random.default_rng(1)
    tokens = np.where(rng.random(600) < 0.2, 1, rng.integers(3, 259, 600))
    cache = open_cache(make_cache(tokens, tokens))
    batch = train_batch(cache, seq_len=16, batch_size=5, seed=0, step=0)
    for inputs_L, segment_ids_L in zip(batch.inputs_BL, batch.segment_ids_BL, strict=True):
        document, expected = 1, []
        for token in inputs_L:
            expected.append(document)
            if token == 1:
                document += 1
        assert segment_ids_L.tolist() == expected


def test_evaluation_reads_the_same_windows_spread_over_the_split(counting):
    def read():
        batches = list(eval_batches(counting, seq_len=8, batch_size=2, sequences=4))
        return [window for batch in batches for window in windows(batch)]

    assert num_windows(counting, "validation", 8) == 11
    assert read() == read() == [0, 2, 5, 8]


def test_the_last_evaluation_batch_is_filled_with_rows_that_are_not_scored(counting):
    batches = list(eval_batches(counting, seq_len=8, batch_size=4, sequences=11))
    assert [batch.inputs_BL.shape for batch in batches] == [(4, 8)] * 3
    assert sum(batch.weights_BL.sum() for batch in batches) == 11 * 8
    scored = np.concatenate([batch.weights_BL.all(axis=1) for batch in batches])
    assert [w for batch in batches for w in windows(batch)][:11] == list(range(11))
    assert scored.tolist() == [True] * 11 + [False]
    assert (batches[-1].segment_ids_BL[-1] == 0).all()


def test_evaluation_on_more_windows_than_there_are_is_refused_before_the_first_batch(counting):
    with pytest.raises(InputError, match=r"train.eval_sequences = 12: .* has 11 windows"):
        eval_batches(counting, seq_len=8, batch_size=4, sequences=12)


def test_a_sequence_longer_than_the_split_is_refused(counting):
    with pytest.raises(InputError, match=r"train.seq_len = 64: must be less than the 59"):
        train_batch(counting, seq_len=64, batch_size=1, seed=0, step=0)
