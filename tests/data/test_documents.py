import gzip
import hashlib
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from modjax.data.prepare import documents
from modjax.data.prepare.documents import scan_text, stdlib_documents, stdlib_split, text_documents
from modjax.errors import InputError


def write(path: Path, text: str) -> Path:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def json_lines(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


SENTENCES = "Sphinx of black quartz, judge my vöw. " * 20
PROSE = "\n\n".join(f"Paragraph {i}. {SENTENCES}" for i in range(700))


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_read_as_what_they_hold(tmp_path, kind, suffix):
    texts = ["first\n", "second ü \u2028 \r\n end"]
    content = json_lines(texts) if kind == "jsonl" else "".join(texts)
    path = write(tmp_path / f"a.{kind}{suffix}", content)
    read = [document.text for document in text_documents([path])]
    assert read == (texts if kind == "jsonl" else ["".join(texts)])


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    path = write(tmp_path / "prose.txt", PROSE)
    texts = [document.text for document in text_documents([path])]
    assert "".join(texts) == PROSE
    assert len(texts) == len(PROSE) // 65_536 + 1
    assert all(65_536 <= len(text) < 67_000 for text in texts[:-1])
    assert all(text.startswith("Paragraph") for text in texts)


def test_text_in_one_endless_line_is_cut_too(tmp_path):
    path = write(tmp_path / "text8", "word " * 200_000)
    texts = [document.text for document in text_documents([path])]
    assert "".join(texts) == "word " * 200_000
    assert len(texts) == 4


def test_a_json_line_is_a_document_and_blank_ones_are_none(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["one", "", "two\n\nlines"]) + "\n\n")
    documents = list(text_documents([path]))
    assert [(d.id, d.text) for d in documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "two\n\nlines"),
    ]


def test_half_a_surrogate_pair_does_not_stop_the_reading(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud800 b"}\n')
    assert [document.text for document in text_documents([path])] == ["a ? b"]


RANDOM = np.random.default_rng(0).integers(97, 123, 50_000, np.uint8).tobytes()


def damaged(compressed: bytes) -> bytes:
    """Returns compressed data with a part after its header overwritten."""
    return compressed[:12] + b"\xff" * 1000 + compressed[1012:]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"id": 1}\n', 'a.jsonl:2.*every line .* string "text"'),
        ("a.jsonl", b'{"text": 7}\n', 'a.jsonl:1.*every line .* string "text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl:1.*every line .* string "text"'),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2.*is not JSON"),
        ("a.txt", b"\xff\xfe\x00", "a.txt.*must be UTF-8 text"),
        ("a.txt.xz", b"not compressed", "a.txt.xz.*cannot be read"),
        ("a.txt.gz", b"not compressed", "a.txt.gz.*cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 10**6)[:-20], "a.txt.gz.*cannot be read"),
        ("a.txt.gz", damaged(gzip.compress(RANDOM)), "a.txt.gz.*cannot be read"),
        ("a.txt.gz", gzip.compress(RANDOM)[:-8] + b"12345678", "a.txt.gz.*cannot be read"),
        ("a.txt.xz", damaged(lzma.compress(RANDOM)), "a.txt.xz.*cannot be read"),
        ("a.txt.xz", lzma.compress(RANDOM)[:-20], "a.txt.xz.*cannot be read"),
        ("a.jsonl", b"[" * 10**5, "a.jsonl:1.*is not JSON .maximum recursion depth"),
        ("a.jsonl", b'{"text": "x"}\n' + b'{"a":' * 10**5, "a.jsonl:2.*is not JSON"),
        ("a.jsonl", b"1" * 10**4, "a.jsonl:1.*is not JSON"),
        ("a.txt", b"", "a.txt.*holds no text"),
        ("a.jsonl", b'{"text": " "}\n', "a.jsonl.*holds no text"),
        ("a.txt", b"hello\n", "a.txt.*holds fewer than two distinct documents"),
        ("a.jsonl", b'{"text": "x"}\n' * 2, "a.jsonl.*fewer than two distinct documents"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"--text = .*{reason}") as caught:
        scan_text([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--text = .*nothing.*: cannot be read: No such file"):
        scan_text([tmp_path / "nothing"])
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        scan_text([tmp_path])
    with pytest.raises(InputError, match=r"cannot be read: File name too long"):
        scan_text([tmp_path / ("a" * 300)])


def test_validation_is_the_lowest_hashes_up_to_a_twentieth_of_the_text(tmp_path):
    texts = [f"document {i} " + "x" * (i % 90) for i in range(2000)]
    scan = scan_text([write(tmp_path / "a.jsonl", json_lines(texts))])
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = [text for text in ranked if scan.split(text) == "validation"]
    assert held_out == ranked[: len(held_out)]
    assert scan.documents == {"train": 2000 - len(held_out), "validation": len(held_out)}
    assert scan.bytes == sum(map(len, texts))
    assert 0.05 <= sum(map(len, held_out)) / scan.bytes < 0.053


def test_two_documents_are_enough_for_a_validation_split(tmp_path):
    scan = scan_text([write(tmp_path / "a.jsonl", json_lines(["one", "two"]))])
    assert scan.documents == {"train": 1, "validation": 1}
    assert {scan.split("one"), scan.split("two")} == {"train", "validation"}


def test_training_keeps_a_document_where_the_last_by_hash_holds_nearly_all_text(tmp_path):
    small = [f"document {i}" for i in range(9)]

    def rank(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    endings = (f"{'x' * 100_000} {i}" for i in range(1000))
    large = next(text for text in endings if rank(text) > max(map(rank, small)))
    scan = scan_text([write(tmp_path / "a.jsonl", json_lines([*small, large]))])
    assert scan.documents == {"train": 1, "validation": 9}
    assert scan.split(large) == "train"


def test_the_scan_depends_on_the_texts_and_not_on_where_they_lie(tmp_path):
    one = write(tmp_path / "a.jsonl", json_lines(["one", "two"]))
    same = write(tmp_path / "b.jsonl.xz", json_lines(["one", "two"]))
    other = write(tmp_path / "c.jsonl", json_lines(["onet", "wo"]))
    assert scan_text([one]) == scan_text([same])
    assert scan_text([one]).digest != scan_text([other]).digest


def test_the_standard_library_is_read_without_tests_and_installed_packages():
    documents = list(stdlib_documents())
    ids = [document.id for document in documents]
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(ids)
    assert ids == sorted(set(ids), key=lambda id: Path(id))
    forbidden = {"test", "tests", "idle_test", "site-packages"}
    assert not [id for id in ids if forbidden & set(Path(id).parts)]
    assert 8e6 < sum(len(document.text.encode()) for document in documents) < 20e6
    text = dict(documents)["json/decoder.py"]
    assert text == Path(sys.modules["json"].__file__).with_name("decoder.py").read_text()


def test_validation_holds_whole_modules_and_about_a_twentieth_of_the_standard_library():
    sizes = {"train": 0, "validation": 0}
    splits_of_module: dict[str, set] = {}
    for document in stdlib_documents():
        split = stdlib_split(document.id)
        sizes[split] += len(document.text)
        splits_of_module.setdefault(document.id.split("/")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_module.values())
    assert splits_of_module["collections"] == {"validation"}
    assert 0.02 < sizes["validation"] / sum(sizes.values()) < 0.12


def test_real_english_is_read(repository_corpora):
    scan = scan_text([repository_corpora / "sotu.jsonl.xz"])
    assert sum(scan.documents.values()) == 233
    assert 0.05 <= scan.documents["validation"] / 233 < 0.1


def test_a_line_of_json_has_a_limit_and_plain_text_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 100_000)
    plain = write(tmp_path / "a.txt.gz", "word " * 100_000)
    assert "".join(d.text for d in text_documents([plain])) == "word " * 100_000
    longest = json.dumps({"text": "x" * (100_000 - 13)}) + "\n"
    assert len(longest) == 100_000
    path = write(tmp_path / "a.jsonl.gz", longest + "x" * 1_000_000)
    read = text_documents([path])
    assert len(next(read).text) == 100_000 - 13
    with pytest.raises(InputError, match=r"a.jsonl.gz:2': a line of JSON may have up to 100,000"):
        next(read)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz"])
def test_a_fifo_is_refused_by_name(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        InputError, match=rf"--text = .*{name}': cannot be read: Not a regular file"
    ):
        scan_text([tmp_path / name])
