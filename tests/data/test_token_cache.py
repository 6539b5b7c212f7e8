import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modjax.bucket import kvstore
from modjax.data.manifest import Manifest, Split, bits_per_byte
from modjax.data.token_cache import (
    cache_dir,
    check_epochs,
    check_vocab,
    epochs,
    list_caches,
    num_windows,
    open_cache,
)
from modjax.errors import InputError
from modjax.specs import DataConfig, ModelSpec

TRAIN = np.random.default_rng(0).integers(1, 259, 200_000)
VALIDATION = np.random.default_rng(1).integers(1, 259, 5_000)


@pytest.fixture
def path(make_cache) -> Path:
    return make_cache(TRAIN, VALIDATION)


def test_reading_gives_back_what_was_written(path):
    cache = open_cache(path)
    np.testing.assert_array_equal(cache.read("train", 32_000, 33_500), TRAIN[32_000:33_500])
    np.testing.assert_array_equal(cache.read("validation", 0, 5_000), VALIDATION)
    starts = [199_990, 5, 70_000]
    expected = np.stack([TRAIN[start : start + 10] for start in starts])
    np.testing.assert_array_equal(cache.gather("train", starts, 10), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("gs://bucket/a/b", "gs://bucket/a/b/"),
        (Path("gs://bucket/a/b"), "gs://bucket/a/b/"),
        (cache_dir(Path("s3://bucket/a"), DataConfig()), "s3://bucket/a/stdlib-bytes/"),
        (Path("file:///data/a"), "file:///data/a/"),
    ],
)
def test_a_bucket_stays_a_bucket_though_path_folds_its_slashes(given, expected):
    assert kvstore(given) == expected
    assert kvstore(Path(given) / "train") == expected + "train/"


def test_the_folder_is_named_by_corpus_and_vocabulary():
    def folder(vocab):
        return cache_dir(Path("data"), DataConfig(name="books", vocab=vocab)).as_posix()

    assert folder("bytes") == "data/books-bytes"
    assert folder("sentencepiece:8192") == "data/books-sentencepiece-8192"
    assert folder("some/where/en.model") == "data/books-en.model"


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        cache = open_cache(path)
        cache.read("train", 0, len(TRAIN))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "modjax data prepare" in message
    return message


def test_a_missing_cache_is_refused_with_the_remedy(tmp_path):
    assert "no token cache here" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no token cache here" in refused(tmp_path / "empty")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "splits": {}}'])
def test_a_damaged_manifest_is_refused(path, content):
    (path / "manifest.json").write_text(content)
    assert "damaged" in refused(path)


def test_a_manifest_of_another_format_is_refused(path):
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**values, "format": 1}))
    message = refused(path)
    assert "this version reads format 2" in message
    assert "of another version, make it again with `modjax data prepare --force`" in message


def test_counts_that_do_not_fit_the_tokens_are_refused(path):
    values = json.loads((path / "manifest.json").read_text())
    values["splits"]["train"]["tokens"] += 1
    (path / "manifest.json").write_text(json.dumps(values))
    assert "damaged" in refused(path)


def test_lost_tokens_are_refused_and_never_read_as_padding(path):
    (path / "0000000000000000" / "train" / "c" / "0").unlink()
    assert "damaged" in refused(path)


def test_a_truncated_file_is_refused(path):
    shard = path / "0000000000000000" / "train" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "damaged" in refused(path)


def test_a_flipped_bit_is_refused(path):
    shard = path / "0000000000000000" / "train" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert "damaged" in refused(path)


def test_a_split_without_tokens_is_refused(make_cache):
    assert "its validation split is empty" in refused(make_cache(TRAIN, []))


def test_epochs_count_windows_and_too_many_are_refused(path):
    cache = open_cache(path)
    assert num_windows(cache, "train", 256) == 199_999 // 256 == 781
    assert epochs(cache, 256, 781 * 3) == 3
    check_epochs(cache, DataConfig(max_epochs=3), 256, 781 * 3)
    with pytest.raises(InputError, match=r"data.max_epochs = 2.5: this run reads stdlib 3.00"):
        check_epochs(cache, DataConfig(max_epochs=2.5), 256, 781 * 3)


def test_a_model_with_too_few_embeddings_is_refused(path):
    def model(size):
        return ModelSpec(
            vocab_size=size, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, d_ff=8
        )

    cache = open_cache(path)
    check_vocab(cache, model(259))
    with pytest.raises(InputError, match=r"model.vocab_size = 258: must be at least 259"):
        check_vocab(cache, model(258))


def test_bits_per_byte_of_a_uniform_guess_are_its_bits():
    # 100 documents of 50 two-byte tokens and an eos, each token guessed among 1024.
    splits = {split: Split(100, 100 * 51, 100 * 100) for split in ("train", "validation")}
    manifest = Manifest("x", "sentencepiece:1024", 1024, 1, "a test", "0", splits)
    assert bits_per_byte(manifest, math.log(1024)) == pytest.approx(10 * 51 / 100)


def test_describe_lists_whole_caches_only(make_cache, tmp_path):
    assert list_caches(tmp_path / "nowhere") == []
    make_cache(TRAIN, VALIDATION, name="b")
    make_cache(VALIDATION, VALIDATION, name="a")
    (tmp_path / ".c-bytes.partial").mkdir()
    (tmp_path / ".c-bytes.partial" / "manifest.json").write_text("{")
    described = list_caches(tmp_path)
    assert [manifest.name for manifest in described] == ["a", "b"]
    assert described[1].splits["train"].tokens == 200_000


def test_reading_never_loads_tensorflow():
    code = (
        "import sys, modjax.data.batches, modjax.data.token_cache, modjax.data.prefetch\n"
        "import modjax.data.prepare.prepare\n"
        "assert not {'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
