"""The arguments of `prepare` where a cache exists already. Without TensorFlow."""

import dataclasses
import types

import pytest

from modjax.data.prepare import corpus
from modjax.data.prepare.documents import Document
from modjax.data.prepare.prepare import prepare
from modjax.data.token_cache import open_cache
from modjax.errors import InputError


@pytest.fixture
def made_from(make_cache, tmp_path):
    """Writes a cache of a corpus, made from `source`, into tmp_path."""

    def make(name: str, source: str):
        path = make_cache([5, 6, 1], [7, 1], name=name)
        manifest = dataclasses.replace(open_cache(path).manifest, source=source)
        (path / "manifest.json").write_text(manifest.to_json())
        return path

    return make


@pytest.mark.parametrize("name", ["c4", "lm1b"])
def test_a_built_in_corpus_may_be_named_as_the_tfds_data_set_it_is(
    made_from, tmp_path, monkeypatch, name
):
    tasks = types.SimpleNamespace(C4="c4/full", LM1B="lm1b/full", resolve_tfds=lambda name: name)
    monkeypatch.setattr(corpus, "load_tasks", lambda: tasks)
    path = made_from(name, f"tfds {name}/full")
    assert prepare(tfds_name=name, data_dir=tmp_path) == path
    assert prepare(name=name, data_dir=tmp_path) == path
    with pytest.raises(InputError, match="--name = 'stdlib': is a built-in corpus"):
        prepare(tfds_name=name, name="stdlib", data_dir=tmp_path)


def test_the_standard_library_of_another_python_is_refused_with_remedies_that_exist(
    made_from, tmp_path
):
    made_from("stdlib", "stdlib of Python 3.0.0 sha256 00")
    with pytest.raises(InputError) as caught:
        prepare(data_dir=tmp_path)
    said = str(caught.value)
    assert said.startswith(f"--data-dir = {str(tmp_path)!r}: holds stdlib-bytes, prepared from")
    assert "Python 3.0.0" in said and "--force" in said and "another --data-dir" in said
    assert "--name" not in said


def test_the_users_text_may_take_another_name(made_from, tmp_path):
    made_from("text", "text sha256 00")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(InputError, match=r"^--name = 'text': .* choose another --name, or"):
        prepare(text_files=[tmp_path / "a.jsonl"], data_dir=tmp_path)


def test_a_standard_library_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    versions = iter(["old", "new"])
    documents = lambda: [Document("a.py", next(versions))]  # noqa: E731
    monkeypatch.setattr(corpus, "stdlib_documents", documents)
    tasks = types.SimpleNamespace(stdlib_source=lambda folder: None)
    monkeypatch.setattr("modjax.data.prepare.prepare.load_tasks", lambda: tasks)
    with pytest.raises(InputError, match=r"^data = 'stdlib': changed while it was read"):
        prepare(data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
