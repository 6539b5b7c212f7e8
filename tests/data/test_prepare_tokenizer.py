"""`prepare` with the tokenizer of a pretrained model. These tests load TensorFlow."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer

from modjax.data.prepare import writer
from modjax.data.prepare.prepare import prepare
from modjax.data.token_cache import cache_dir, open_cache
from modjax.errors import InputError, SharedFault
from modjax.specs import DataConfig
from tests.data.codecs.small import LINES, ODD, byte_level, fields_of_bytes, write_gguf

pytestmark = pytest.mark.usefixtures("tensorflow")
TEXTS = [text for text in ODD if text.strip()] + [
    f"{i} " + "".join(LINES[i : i + 1 + i % 9]) for i in range(300)
]
EOS = 4


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "toy.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model whose tokenizer would begin each text with <s>."""
    folder = tmp_path_factory.mktemp("models") / "Small-0.1B"
    folder.mkdir()
    tokenizer = byte_level("smollm")
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="module")
def made(text_file, model, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    return prepare(text_files=[text_file], name="toy", tokenizer=model, data_dir=data_dir)


def tokens(cache, split) -> np.ndarray:
    return cache.read(split, 0, cache.manifest.splits[split].tokens)


def documents(cache) -> list[list[int]]:
    """Returns the tokens of all documents, sorted."""
    both = np.concatenate([tokens(cache, split) for split in cache.manifest.splits])
    parts = np.split(both, np.flatnonzero(both == EOS) + 1)[:-1]
    return sorted(part.tolist() for part in parts)


def test_documents_are_plain_text_and_one_end(made, model):
    cache = open_cache(made)
    reader = Tokenizer.from_file(str(model / "tokenizer.json"))
    reader.no_truncation()
    reader.encode_special_tokens = True
    expected = sorted([*reader.encode(text).ids, EOS] for text in TEXTS)
    found = documents(cache)
    assert found == expected
    assert all(set(ids[:-1]).isdisjoint(range(5)) for ids in found), "no control token of the text"
    counts = cache.manifest.splits.values()
    assert sum(split.bytes for split in counts) == sum(len(text.encode()) for text in TEXTS)
    assert sum(split.documents for split in counts) == len(TEXTS)


def test_a_config_finds_the_cache_and_its_codec_spells_the_text(made, model):
    data = DataConfig(name="toy", vocab="Small-0.1B.json")
    assert made == cache_dir(made.parent, data) and made.name == "toy-Small-0.1B.json"
    cache = open_cache(made)
    about = cache.manifest
    assert (about.vocab, about.vocab_size, about.eos_id) == (data.vocab, 700, EOS)
    assert cache.vocabulary() == (model / "tokenizer.json").read_bytes()
    assert {p.name for p in (made / about.folder).iterdir()} == {"tokenizer.json", *about.splits}
    codec = cache.codec()
    spelled = [b"".join(codec.pieces(ids)).decode() for ids in documents(cache)]
    assert sorted(spelled) == sorted(TEXTS)
    assert codec.encode(TEXTS[2], "text") == open_cache(made).codec().encode(TEXTS[2], "text")


def test_a_cache_is_of_one_tokenizer_and_one_end(made, text_file, model, tmp_path):
    options = dict(text_files=[text_file], name="toy", data_dir=made.parent)
    assert prepare(tokenizer=model / "../Small-0.1B", **options) == made, "it is there"
    other = tmp_path / "Small-0.1B"
    other.mkdir()
    byte_level("smollm").save(str(other / "tokenizer.json"))
    for end in ("<|im_end|>", "</s>"):
        content = (model if end == "</s>" else other) / "tokenizer.json"
        (other / "tokenizer.json").write_bytes(content.read_bytes())
        (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        with pytest.raises(InputError, match=r"--name = 'toy': .* was prepared from other input"):
            prepare(tokenizer=other, **options)


def test_a_gguf_file_gives_the_tokens_of_the_folder_that_it_was_made_of(made, text_file, tmp_path):
    fields = fields_of_bytes(byte_level("smollm"), "smollm") | {"ggml.eos_token_id": EOS}
    path = write_gguf(tmp_path / "Small.Q4.gguf", fields)
    gguf = prepare(text_files=[text_file], name="toy", tokenizer=path, data_dir=tmp_path)
    assert gguf.name == "toy-Small.Q4.json"
    ours, theirs = open_cache(gguf), open_cache(made)
    for split, counts in theirs.manifest.splits.items():
        assert ours.manifest.splits[split] == counts
        assert np.array_equal(tokens(ours, split), tokens(theirs, split))


def test_a_preparation_that_was_stopped_resumes_to_the_same_cache(
    made, text_file, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "SHARD", writer.CHUNK)
    real, calls = writer.write_journal, []

    def stop(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    from modjax.data.prepare import prepare as module

    options = dict(text_files=[text_file], name="toy", tokenizer=model, data_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_journal", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(**options)
    assert (tmp_path / ".toy-Small-0.1B.json.partial" / "tokenizer.json").exists()
    ours, theirs = open_cache(prepare(**options)), open_cache(made)
    for split in theirs.manifest.splits:
        assert np.array_equal(tokens(ours, split), tokens(theirs, split))


def test_more_than_65536_tokens_are_stored_as_uint32(text_file, tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    tokenizer.save(str(tmp_path / "large.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}')
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"a <{i}>"}) + "\n" for i in (0, 65_000, 65_535)))
    made = prepare(text_files=[text], tokenizer=tmp_path / "large.json", data_dir=tmp_path)
    cache = open_cache(made)
    assert cache.manifest.vocab == "large.json" and cache.manifest.vocab_size == 700 + 2**16
    found = documents(cache)
    assert cache.read("train", 0, 1).dtype == np.uint32
    assert sorted(d[-2] for d in found) == [700, 65_700, 66_235]


def test_special_tokens_that_no_document_has_do_not_count(text_file, tmp_path):
    """Gemma 3 has one that its model has no embedding for."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<image>", "<end>", "<audio>"])
    tokenizer.save(str(tmp_path / "a.json"))
    for end, size in (("</s>", 700), ("<end>", 702)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        options = dict(tokenizer=tmp_path / "a.json", data_dir=tmp_path / end.strip("</>"))
        assert open_cache(prepare(text_files=[text_file], **options)).manifest.vocab_size == size


def test_a_lost_or_changed_tokenizer_is_named(text_file, model, tmp_path):
    made = prepare(text_files=[text_file], tokenizer=model, data_dir=tmp_path)
    cache = open_cache(made)
    file = made / cache.manifest.folder / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"it was made with another tokenizer.json"):
        cache.codec()
    file.unlink()
    with pytest.raises(InputError, match=r"it has lost its tokenizer.json") as caught:
        cache.codec()
    assert not isinstance(caught.value, SharedFault)


@pytest.mark.parametrize(
    ("files", "options", "reason"),
    [
        ({}, {}, "no tokenizer here: must be a folder with a tokenizer.json, a tokenizer.json"),
        ({"tokenizer.json": "{"}, {}, "it is no tokenizer.json, or damaged"),
        (
            {"tokenizer.json": None},
            {},
            "--tokenizer = .*: has no end-of-sequence token: its",
        ),
        (
            {"tokenizer.json": None},
            {"vocab": "bytes"},
            "--vocab = 'bytes': cannot be combined",
        ),
        ({"tokenizer.json": None}, {"vocab": ""}, "--vocab = '': cannot be combined with --tok"),
    ],
)
def test_bad_input_is_refused_in_one_line(files, options, reason, model, text_file, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content or (model / name).read_text())
    data_dir = tmp_path / "data"
    with pytest.raises(InputError, match=reason) as caught:
        prepare(text_files=[text_file], tokenizer=folder, data_dir=data_dir, **options)
    assert "\n" not in str(caught.value) and not data_dir.exists()


def test_a_missing_package_is_named_with_the_remedy(model, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"^tokenizers = .*pip install -e '.\[pretrained\]'"):
        prepare(text_files=[text_file], tokenizer=model, data_dir=tmp_path)
