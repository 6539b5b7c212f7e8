"""`prepare` end to end. These tests load TensorFlow."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from modjax.data.prepare.documents import scan_text, stdlib_documents, stdlib_split
from modjax.data.prepare.prepare import prepare
from modjax.data.token_cache import list_caches, open_cache
from modjax.errors import InputError

pytestmark = pytest.mark.usefixtures("tensorflow")
LETTERS = np.random.default_rng(0).choice(list("aeiounrst"), (500, 6))
WORDS = ["".join(letters) for letters in LETTERS]
TEXTS = [
    f"Document {i}: ü 日本\n\tthen  " + " ".join(WORDS[i : i + 2 * (i % 7)]) + "\n"
    for i in range(300)
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "toy.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def as_bytes(text_file, tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    return prepare(text_files=[text_file], name="toy", data_dir=data_dir)


@pytest.fixture(scope="module")
def as_pieces(text_file, as_bytes) -> Path:
    return prepare(
        text_files=[text_file], name="toy", vocab="sentencepiece:400", data_dir=as_bytes.parent
    )


def documents(path: Path, split: str) -> list[list[int]]:
    """Returns the cached tokens of each document, without its eos."""
    cache = open_cache(path)
    tokens = cache.read(split, 0, cache.manifest.splits[split].tokens)
    ends = np.flatnonzero(tokens == cache.manifest.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [document[:-1].tolist() for document in np.split(tokens, ends[:-1] + 1)]


def expected(text_file: Path, split: str) -> list[str]:
    scan = scan_text([text_file])
    return [text for text in TEXTS if scan.split(text) == split]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_bytes_are_shifted_by_three_and_every_document_ends_in_eos(as_bytes, text_file, split):
    texts = expected(text_file, split)
    assert documents(as_bytes, split) == [[b + 3 for b in t.encode()] for t in texts]
    counts = open_cache(as_bytes).manifest.splits[split]
    assert counts.documents == len(texts)
    assert counts.bytes == sum(len(t.encode()) for t in texts) == counts.tokens - len(texts)


def test_the_manifest_says_what_the_cache_holds(as_bytes, as_pieces):
    assert [as_bytes.name, as_pieces.name] == ["toy-bytes", "toy-sentencepiece-400"]
    one, other = list_caches(as_bytes.parent)[:2]
    assert (one.name, one.vocab, one.vocab_size, one.eos_id) == ("toy", "bytes", 259, 1)
    assert (other.vocab, other.vocab_size, other.eos_id) == ("sentencepiece:400", 400, 1)
    assert one.source == other.source and one.source.startswith("text sha256 ")
    assert one.fingerprint != other.fingerprint
    folder = one.fingerprint[:16]
    assert sorted(path.name for path in as_bytes.iterdir()) == sorted([folder, "manifest.json"])
    assert sorted(path.name for path in (as_bytes / folder).iterdir()) == ["train", "validation"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_trained_vocabulary_loses_no_text(as_pieces, text_file, split):
    content = open_cache(as_pieces).vocabulary()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    decoded = [model.decode(document) for document in documents(as_pieces, split)]
    assert decoded == expected(text_file, split)


@pytest.mark.parametrize("vocab", ["bytes", "sentencepiece:400"])
def test_the_same_text_elsewhere_gets_the_same_fingerprint(
    as_bytes, as_pieces, text_file, tmp_path, vocab
):
    copy = shutil.copy(text_file, tmp_path / "copy.jsonl")
    path = prepare(text_files=[copy], name="other", vocab=vocab, data_dir=tmp_path)
    reference = as_bytes if vocab == "bytes" else as_pieces
    assert open_cache(path).manifest.fingerprint == open_cache(reference).manifest.fingerprint


def test_a_vocabulary_file_is_used_and_kept(as_pieces, text_file, tmp_path):
    model = tmp_path / "en.model"
    model.write_bytes(open_cache(as_pieces).vocabulary())
    path = prepare(text_files=[text_file], vocab=str(model), data_dir=tmp_path / "data")
    assert path.name == "text-en.model"
    assert open_cache(path).manifest.vocab == "en.model"
    assert open_cache(path).manifest.fingerprint == open_cache(as_pieces).manifest.fingerprint
    assert open_cache(path).vocabulary() == model.read_bytes()


def test_a_prepared_cache_is_left_alone_and_other_input_needs_force(text_file, tmp_path):
    path = prepare(text_files=[text_file], data_dir=tmp_path)
    first, when = open_cache(path).manifest, (path / "manifest.json").stat().st_mtime_ns
    assert prepare(text_files=[text_file], data_dir=tmp_path) == path
    assert (path / "manifest.json").stat().st_mtime_ns == when

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(InputError, match=r"--name = .*other input .* replace it with --force"):
        prepare(text_files=[other], data_dir=tmp_path)
    assert open_cache(path).manifest == first
    prepare(text_files=[other], data_dir=tmp_path, force=True)
    assert open_cache(path).manifest.splits["train"].documents == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "text-bytes"]


def test_the_standard_library_is_a_tfds_data_set_read_whole(tmp_path):
    path = prepare(data_dir=tmp_path)
    manifest = open_cache(path).manifest
    assert (path.name, manifest.name) == ("stdlib-bytes", "stdlib")
    for split in ("train", "validation"):
        texts = [d.text.encode() for d in stdlib_documents() if stdlib_split(d.id) == split]
        read = [bytes(t - 3 for t in document) for document in documents(path, split)]
        assert sorted(read) == sorted(texts)
        assert manifest.splits[split].documents == len(texts)


def test_training_a_vocabulary_prints_only_our_own_lines(text_file, tmp_path, capfd):
    prepare(text_files=[text_file], vocab="sentencepiece:401", data_dir=tmp_path)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert all(line.startswith("modjax: ") for line in printed.err.splitlines())


def test_missing_packages_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(InputError, match=r"seqio.*pip install -e '.\[data\]'"):
        prepare(data_dir=tmp_path)


def test_tasks_are_registered_with_seqio_by_name():
    import seqio

    for name in ("modjax_stdlib", "modjax_c4", "modjax_lm1b"):
        assert set(seqio.get_mixture_or_task(name).splits) == {"train", "validation"}


def test_any_tfds_data_set_with_a_text_feature_will_do(tensorflow, tmp_path):
    import tensorflow_datasets as tfds

    class ModjaxTestNews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int32)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"text": f"news {i}", "label": i}) for i in range(200))}

        def _generate_examples(self):
            raise NotImplementedError

    class ModjaxTestNumbers(ModjaxTestNews):
        def _info(self):
            features = tfds.features.FeaturesDict({"label": tfds.features.Scalar(np.int32)})
            return tfds.core.DatasetInfo(builder=self, features=features)

    with pytest.raises(InputError, match=r"--tfds = 'modjax_test_numbers': .* named \"text\""):
        prepare(tfds_name="modjax_test_numbers", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"--tfds = 'no_such_set': .* TFDS knows"):
        prepare(tfds_name="no_such_set", data_dir=tmp_path)
    path = prepare(tfds_name="modjax_test_news", data_dir=tmp_path)
    manifest = open_cache(path).manifest
    assert path.name == "modjax_test_news-bytes"
    assert manifest.source == "tfds modjax_test_news:1.2.0"
    assert [manifest.splits[s].documents for s in ("train", "validation")] == [190, 10]
    read = [bytes(t - 3 for t in d) for s in manifest.splits for d in documents(path, s)]
    assert sorted(read) == sorted(f"news {i}".encode() for i in range(200))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "nonesuch"}, "--name = 'nonesuch': unknown corpus; must be one of stdlib, c4"),
        ({"name": "../up", "text_files": ["x"]}, r"--name = '../up': must be made of letters"),
        (
            {"name": "-x", "text_files": ["x"]},
            "--name = '-x': .*without any of .*must not begin with '.', '-' or a space",
        ),
        ({"name": "x" * 101, "text_files": ["missing.txt"]}, "--name = 'x*': names a folder"),
        ({"name": ""}, "--name = '': .*must be 1 to 100 bytes"),
        ({"name": "", "text_files": ["x"]}, "--name = '': .*must be 1 to 100 bytes"),
        ({"tfds_name": ""}, "--tfds = '': is empty"),
        ({"name": "c4", "text_files": ["x"]}, "--name = 'c4': is a built-in corpus"),
        ({"text_files": ["x"], "tfds_name": "y"}, "--tfds = 'y': cannot be combined"),
        ({"text_files": ["missing.txt"]}, r"--text = 'missing.txt': cannot be read: No such"),
        ({"vocab": "words"}, "--vocab = 'words': must be bytes, sentencepiece:SIZE or a"),
        ({"vocab": "sentencepiece:many"}, "--vocab = 'sentencepiece:many': must give a number"),
        ({"vocab": "sentencepiece:-1"}, "--vocab = 'sentencepiece:-1': must give a number"),
        ({"vocab": "sentencepiece:1e9"}, "--vocab = 'sentencepiece:1e9': must give a number"),
        ({"vocab": "sentencepiece:1000001"}, "must give a number of pieces up to 1,000,000"),
        ({"vocab": "sentencepiece:1" + "0" * 400}, "must give a number of pieces up to 1,000,000"),
        ({"vocab": "sentencepiece:٣"}, "must give a number of pieces"),
        ({"vocab": "a\n.model"}, r"--vocab = 'a.n.model': .* bytes of printable characters"),
        ({"vocab": "missing.model"}, "--vocab = 'missing.model': cannot be read: No such"),
        ({"data_dir": Path("ftp://a/data")}, "= 'ftp://a/data/stdlib-bytes': .* unsupported URL"),
        ({"data_dir": Path(__file__)}, "--data-dir = .*cannot be made"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(tmp_path, arguments, reason):
    data_dir = tmp_path / "data"
    with pytest.raises(InputError, match=reason) as caught:
        prepare(**{"data_dir": data_dir, **arguments})
    assert "\n" not in str(caught.value)
    assert not data_dir.exists()


def test_a_file_that_is_no_model_and_one_without_eos_are_refused(tmp_path):
    (tmp_path / "a.model").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="it is not a SentencePiece model"):
        prepare(vocab=str(tmp_path / "a.model"), data_dir=tmp_path)
    options = dict(vocab_size=80, eos_id=-1, minloglevel=3, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "b"), **options
    )
    with pytest.raises(InputError, match="has no end-of-sequence piece"):
        prepare(vocab=str(tmp_path / "b.model"), data_dir=tmp_path)


def test_more_pieces_than_the_text_can_give_are_refused(text_file, tmp_path):
    with pytest.raises(InputError, match=r"sentencepiece:8192.*too high .8192.") as caught:
        prepare(text_files=[text_file], vocab="sentencepiece:8192", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_real_english_is_prepared(repository_corpora, tmp_path):
    path = prepare(text_files=[repository_corpora / "gutenberg.jsonl.xz"], data_dir=tmp_path)
    manifest = open_cache(path).manifest
    assert sum(split.documents for split in manifest.splits.values()) == 18
    assert sum(split.bytes for split in manifest.splits.values()) == 11_744_855
