"""`modjax score` for a finished run: its output, and bad input in one line."""

import gzip
import json

import pytest

pytestmark = pytest.mark.usefixtures("quick_compiles")
LINES = [
    {"doc_id": doc, "idx": i, "label": 1, "request": {"context": f"Q{doc}:", "continuation": text}}
    for doc in range(3)
    for i, text in enumerate((" no", " yes"))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a text, JSON lines of texts, a task, and damaged files."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "plain.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    texts = "".join(json.dumps({"text": text}) + "\n" for text in ("a = 1", "b = 22", "x"))
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    task = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "task.jsonl.gz").write_bytes(gzip.compress(task.encode()))
    (folder / "empty.jsonl").write_text("\n")
    (folder / "field.jsonl").write_text(task + '{"doc_id": 3, "idx": 0}\n')
    (folder / "label.jsonl").write_text(task.replace('"label": 1', '"label": 2'))
    long = LINES[0] | {"label": 0, "request": {"context": "a" * 65_536, "continuation": "b"}}
    (folder / "long.jsonl").write_text(json.dumps(long))
    return folder


def test_text_is_scored_by_file_and_pooled(said, where, files):
    texts = ["--text", files / "plain.txt", files / "texts.jsonl.gz", "--seq-len=32"]
    code, out, err = said("score", *where, *texts, "--json")
    assert (code, err) == (0, "")
    plain, lines, pooled = json.loads(out)
    assert plain["name"] == str(files / "plain.txt") and pooled["name"] == "pooled"
    assert [one["count"] for one in (plain, lines, pooled)] == [539, 9, 548]
    values = pooled["measures"]["nats"]
    assert set(values) == {"score"} and 1 < values["score"]["value"] < 8
    sums = [one["count"] * one["measures"]["nats"]["score"]["value"] for one in (plain, lines)]
    assert values["score"]["value"] == pytest.approx(sum(sums) / 548)
    assert values["score"]["low"] < values["score"]["value"] < values["score"]["high"]
    assert 0 <= pooled["layers"]["1_mod.0"]["capacity"] <= 1
    code, out, err = said("score", *where, *texts, "--limit=1")
    assert (code, err) == (0, "")
    header, first, second, last, _, layers, all_, mod = out.splitlines()
    assert header.split()[:4] == ["file", "measure", "n", "score"]
    assert (
        first.split()[1:3] == ["nats", "539"]
        and f"{plain['measures']['nats']['score']['value']:.4f} [" in first
    )
    assert second.split()[1:3] == ["nats", "4"] and last.startswith("pooled")
    assert layers.split()[0] == "layer" and (all_.split()[0], mod.split()[0]) == ("all", "1_mod.0")


def test_tasks_are_scored(said, where, files):
    code, out, err = said(
        "score", *where, f"--tasks={files / 'task.jsonl.gz'}", "--limit=2", "--json"
    )
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert found["count"] == 2 and list(found["measures"]) == ["accuracy", "per byte", "nats"]
    assert found["measures"]["accuracy"]["score"]["value"] in (0, 0.5, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "one of the arguments --text --tasks is required"),
        (["--text=plain.txt", "--tasks=task.jsonl.gz"], "not allowed with argument"),
        (["--text=missing.txt"], "missing.txt': cannot be read: No such file"),
        (["--text=task.jsonl.gz"], ':1\': every line must be an object with a string "text"'),
        (["--text=empty.jsonl"], "empty.jsonl': holds no text of two tokens or more"),
        (["--text=plain.txt", "--seq-len=0"], "--seq-len = 0: must be 1 to 65536"),
        (["--text=plain.txt", "--limit=0"], "--limit = 0: must be greater than 0"),
        (["--text=plain.txt", "--routing=all"], "--routing = 'all': must be one of"),
        (["--text=plain.txt", "--routing=trained"], "--routing = 'trained': looks at tokens"),
        (["--text=plain.txt", "--routers=x"], "--routers = 'x': needs --pretrained"),
        (["--tasks=empty.jsonl"], "empty.jsonl': holds no document"),
        (["--tasks=plain.txt"], "plain.txt:1': is not JSON"),
        (["--tasks=field.jsonl"], 'field.jsonl:7\': needs "label"'),
        (["--tasks=label.jsonl"], 'label.jsonl:1\': doc_id 0 has "idx" [0, 1]'),
        (["--tasks=long.jsonl"], "long.jsonl:1': has 65537 tokens; must have at most 65536"),
    ],
)
def test_bad_input_is_one_line(said, where, files, arguments, reason, monkeypatch):
    monkeypatch.chdir(files)
    code, out, err = said("score", *where, *arguments)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1
