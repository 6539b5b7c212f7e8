"""Files of tasks: their documents, and what is wrong with them."""

import gzip
import json

import pytest

from modjax.errors import InputError
from modjax.finished.tasks import read_task


def line(doc_id=0, idx=0, label=0, context="Q: a", continuation=" b", **others):
    request = {"context": context, "continuation": continuation}
    return {"doc_id": doc_id, "idx": idx, "label": label, "request": request, **others}


def write(path, lines):
    text = "".join(json.dumps(one) + "\n" for one in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_documents_keep_their_order_and_sort_their_continuations(tmp_path):
    lines = [
        line(7, 1, 1),
        line(3, 0, 0, context=""),
        line(7, 0, 1, continuation=" c"),
        line(10**6, 0, 0),
    ]
    file = write(tmp_path / "task.jsonl.gz", lines)
    first, second = read_task(file, None)
    assert [(one.doc_id, one.idx) for one in first] == [(7, 0), (7, 1)]
    assert [one.continuation for one in first] == [" c", " b"] and first[0].label == 1
    assert [(one.where, one.context) for one in second] == [(f"{file}:2", "")]
    assert read_task(file, 1) == [first]


def test_a_label_may_be_a_text(tmp_path):
    file = write(tmp_path / "task.json", [line(0, label=["a", "b"]), line(1, label="a")])
    assert [document[0].label for document in read_task(file, None)] == [["a", "b"], "a"]


def without(name, value=None):
    """Returns a line that lacks a field, or has another value there."""
    one = line()
    place = one["request"] if "." in name else one
    del place[name.rpartition(".")[2]]
    return one if value is None else {**one, name: value}


@pytest.mark.parametrize(
    ("lines", "number", "reason"),
    [
        ([line(), without("doc_id")], 2, 'needs "doc_id", an integer'),
        ([without("idx")], 1, 'needs "idx", an integer'),
        ([without("idx", "0")], 1, 'needs "idx", an integer'),
        ([without("label")], 1, 'needs "label", the idx of the right continuation, or its text'),
        ([without("request", "x")], 1, 'needs "request.context", a string'),
        ([without("request.context")], 1, 'needs "request.context", a string'),
        ([without("request.continuation")], 1, 'needs "request.continuation", a string'),
        ([line(continuation="")], 1, 'needs "request.continuation", a string that is not empty'),
        ([[1]], 1, 'needs "doc_id"'),
        ([line(), line(5, label=1)], 2, 'doc_id 5 has "idx" [0], which must count from 0, and "'),
        ([line(5, label=-1)], 1, 'doc_id 5 has "idx" [0]'),
        ([line(), line(1, label="b")], 2, 'doc_id 1 has "idx" [0]'),
        ([line(label="b"), line(1)], 2, 'doc_id 1 has "idx" [0]'),
        ([line(label="b"), line(idx=1, label="b")], 1, 'doc_id 0 has "idx" [0, 1]'),
        ([line(idx=1)], 1, 'doc_id 0 has "idx" [1], which must count from 0, and "label" 0, whi'),
        ([line(), line()], 1, 'doc_id 0 has "idx" [0, 0]'),
    ],
)
def test_bad_lines_are_named_by_file_line_and_field(tmp_path, lines, number, reason):
    file = write(tmp_path / "task.jsonl", lines)
    with pytest.raises(InputError) as caught:
        read_task(file, None)
    assert str(caught.value).startswith(f"--tasks = '{file}:{number}': {reason}")


def test_files_without_documents_are_refused(tmp_path):
    empty, skipped = tmp_path / "empty.jsonl", tmp_path / "skipped.jsonl"
    write(empty, [])
    write(skipped, [line(10**6)])
    (tmp_path / "text.jsonl").write_text("no json\n")
    (tmp_path / "damaged.gz").write_bytes(gzip.compress(b"{}")[:12])
    for name, reason in {
        "empty.jsonl": "': holds no document",
        "skipped.jsonl": "': holds no document",
        "text.jsonl": ":1': is not JSON",
        "damaged.gz": "': cannot be read",
        "missing.jsonl": "': cannot be read: No such file",
        ".": "': cannot be read: Is a directory",
    }.items():
        with pytest.raises(InputError) as caught:
            read_task(tmp_path / name, None)
        assert str(caught.value).startswith(f"--tasks = '{tmp_path / name}{reason}")
