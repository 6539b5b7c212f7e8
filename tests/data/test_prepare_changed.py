"""Input that changes while it is prepared, or between two runs. These tests load TensorFlow."""

import json
import os
import shutil
from pathlib import Path

import pytest

from modjax.data.prepare import documents, prepare
from modjax.data.prepare.documents import scan_text
from modjax.data.token_cache import open_cache
from modjax.data.vocabulary import train_sentencepiece
from modjax.errors import InputError

pytestmark = pytest.mark.usefixtures("tensorflow")
PIECES = "sentencepiece:280"


def content(word: str) -> str:
    """Returns 200 documents, of the same sizes for every `word` of one length."""
    return "".join(json.dumps({"text": f"{word} {i:03} and so on"}) + "\n" for i in range(200))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(content("old"))
    return path


@pytest.fixture
def before_reading(monkeypatch):
    """Calls a function before the `nth` reading of the input, counted from the scan as 0."""

    def at(nth: int, do) -> None:
        read, passes = documents.text_documents, iter(range(100))

        def reading(files):
            if next(passes) == nth:
                do()
            yield from read(files)

        monkeypatch.setattr(documents, "text_documents", reading)

    return at


@pytest.mark.parametrize(
    ("vocab", "nth", "what"),
    [
        ("bytes", 1, "its first reading"),
        ("bytes", 2, "reading it for validation"),
        (PIECES, 1, "training the vocabulary"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    text, tmp_path, before_reading, vocab, nth, what
):
    before_reading(nth, lambda: text.write_text(content("new")))
    with pytest.raises(
        InputError, match=r"--text = .*a.jsonl': changed while it was read"
    ) as caught:
        prepare.prepare(text_files=[text], vocab=vocab, data_dir=tmp_path / "data")
    assert "\n" not in str(caught.value), what
    assert not (tmp_path / "data" / f"text-{vocab.replace(':', '-')}" / "manifest.json").exists()
    if nth == 1 and vocab == "bytes":
        path = prepare.prepare(text_files=[text], data_dir=tmp_path / "data")
        assert open_cache(path).manifest.source == f"text sha256 {scan_text([text]).digest}"


def test_a_file_that_vanishes_or_breaks_while_it_is_read_is_named(text, tmp_path, before_reading):
    before_reading(1, lambda: text.unlink())
    with pytest.raises(InputError, match=r"--text = .*a.jsonl': cannot be read: No such file"):
        prepare.prepare(text_files=[text], data_dir=tmp_path / "data")
    text.write_text(content("old"))
    before_reading(1, lambda: text.write_bytes(b'{"text": "\xff"}\n'))
    with pytest.raises(InputError, match=r"--text = .*a.jsonl': must be UTF-8"):
        prepare.prepare(text_files=[text], data_dir=tmp_path / "data")


def test_a_run_goes_on_from_tokens_of_the_same_file_only(text, tmp_path, monkeypatch):
    """A run is stopped while the file holds other text; the next finds the old text again."""
    monkeypatch.setattr("modjax.data.prepare.writer.SHARD", 2**13)
    monkeypatch.setattr("modjax.data.prepare.writer.CHUNK", 2**10)
    long = "".join(content(f"{word}{'x' * 300}") for word in ("old", "older"))
    text.write_text(long)
    reference = prepare.prepare(text_files=[text], data_dir=tmp_path / "reference")
    partial = tmp_path / "data" / ".text-bytes.partial"
    scan, write_journal = documents.scan_text, prepare.write_journal

    def scan_and_replace(files):
        found = scan(files)
        os.replace(text, tmp_path / "kept")
        text.write_text(long.replace("old", "new"))
        return found

    def write_and_stop(folder, request, written):
        write_journal(folder, request, written)
        if written["train"].tokens:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("modjax.data.prepare.corpus.scan_text", scan_and_replace)
        patched.setattr(prepare, "write_journal", write_and_stop)
        prepare.prepare(text_files=[text], data_dir=tmp_path / "data")
    assert json.loads((partial / "journal.json").read_text())["splits"]["train"]["tokens"] == 2**13
    os.replace(tmp_path / "kept", text)
    path = prepare.prepare(text_files=[text], data_dir=tmp_path / "data")
    assert open_cache(path).manifest == open_cache(reference).manifest


def flipped(content: bytes) -> bytes:
    """Returns a model with one bit of a score flipped."""
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, tensorflow) -> Path:
    """The cache of the old text with a trained vocabulary."""
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_text(content("old"))
    return prepare.prepare(text_files=[path], vocab=PIECES, data_dir=path.parent / "data")


def test_a_vocabulary_that_was_damaged_between_two_runs_is_made_again(
    text, tmp_path, monkeypatch, pieces
):
    options = {"text_files": [text], "vocab": PIECES, "data_dir": tmp_path / "data"}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare, "write_split", killed)
        prepare.prepare(**options)
    model = tmp_path / "data" / f".{pieces.name}.partial" / "vocabulary.model"
    model.write_bytes(flipped(model.read_bytes()))
    assert open_cache(prepare.prepare(**options)).manifest == open_cache(pieces).manifest


@pytest.mark.parametrize("damage", ["another", "one bit", "lost"])
def test_a_vocabulary_that_is_not_the_one_of_the_tokens_is_refused(text, tmp_path, pieces, damage):
    options = {"text_files": [text], "vocab": PIECES, "data_dir": tmp_path / "data"}
    path = shutil.copytree(pieces, tmp_path / "data" / pieces.name)
    model = path / open_cache(path).manifest.folder / "vocabulary.model"
    good = model.read_bytes()
    if damage == "lost":
        model.unlink()
    elif damage == "one bit":
        model.write_bytes(flipped(good))
    else:
        texts = [json.loads(line)["text"] for line in content("new").splitlines()]
        other = train_sentencepiece(texts, 280)
        assert other != good
        model.write_bytes(other)
    said = r"^data = .*data prepare --force` \(it (was made with another|has lost its) vocab"
    for use in (open_cache(path).vocabulary, lambda: prepare.prepare(**options)):
        with pytest.raises(InputError, match=said):
            use()
    if damage == "lost":
        prepare.prepare(**options, force=True)
        assert open_cache(path).vocabulary() == good


def test_a_cache_of_an_earlier_version_is_assumed_to_have_its_own_vocabulary(pieces, tmp_path):
    path = shutil.copytree(pieces, tmp_path / pieces.name)
    manifest = json.loads((path / "manifest.json").read_text())
    assert len(manifest.pop("vocab_sha256")) == 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert open_cache(path).vocabulary() == open_cache(pieces).vocabulary()
