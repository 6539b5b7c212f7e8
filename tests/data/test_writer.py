import hashlib

import numpy as np
import pytest
import tensorstore as ts

from modjax.data.prepare.writer import SHARD, Written, read_journal, write_journal, write_split

DTYPE = np.dtype(np.uint16)


def read(folder) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec).result().read().result()


def documents(lengths) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 300, n, np.uint16), n - 1) for n in lengths]


# Two whole shards and a rest: one document spans shards, one ends exactly with a shard.
LENGTHS = [SHARD - 1000, 3000, SHARD - 2000, 10, 5000]


def test_documents_are_stored_end_to_end_and_counted(tmp_path):
    given = documents(LENGTHS)
    *_, written = write_split(tmp_path, given, DTYPE, Written())
    stream = np.concatenate([tokens for tokens, _ in given])
    np.testing.assert_array_equal(read(tmp_path), stream)
    tokens = sum(LENGTHS)
    assert (written.documents, written.tokens, written.bytes) == (5, tokens, tokens - 5)
    assert written.done
    digest = ""
    for start in range(0, len(stream), SHARD):
        shard = stream[start : start + SHARD].tobytes()
        digest = hashlib.sha256(digest.encode() + shard).hexdigest()
    assert written.digest == digest


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_a_run_that_stopped_goes_on_to_the_same_array(tmp_path, stop_after):
    given = documents(LENGTHS)
    *_, whole = write_split(tmp_path / "whole", given, DTYPE, Written())

    class Killed(Exception):
        pass

    def killed():
        yield from given[:stop_after]
        raise Killed

    saved = []
    with pytest.raises(Killed):
        for progress in write_split(tmp_path / "resumed", killed(), DTYPE, Written()):
            saved.append(progress)
    assert saved, "the run must stop behind a full shard"
    rest = given[saved[-1].documents :]
    *_, resumed = write_split(tmp_path / "resumed", rest, DTYPE, saved[-1])
    assert resumed == whole
    np.testing.assert_array_equal(read(tmp_path / "resumed"), read(tmp_path / "whole"))


def test_a_run_stopped_before_its_first_shard_starts_over(tmp_path):
    given = documents([100, 50, 7])
    list(write_split(tmp_path, documents([999]), DTYPE, Written()))
    list(write_split(tmp_path, given, DTYPE, Written()))
    np.testing.assert_array_equal(read(tmp_path), np.concatenate([t for t, _ in given]))


def test_the_journal_of_other_input_is_swept_away(tmp_path):
    written = {"train": Written(3, 1, 10, 7, "ab"), "validation": Written()}
    write_journal(tmp_path, "one text", written)
    (tmp_path / "train").mkdir()
    assert read_journal(tmp_path, "one text") == written
    assert (tmp_path / "train").exists()
    assert read_journal(tmp_path, "another") == {"train": Written(), "validation": Written()}
    assert list(tmp_path.iterdir()) == []
