"""Readers of a run import only what the user names, and refuse a run of other code."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest

import modjax
from modjax.cli.main import main
from modjax.errors import InputError
from modjax.finished import runs
from modjax.records import (
    read_provenance,
    read_record,
    read_spec,
    write_provenance,
    write_record,
    write_spec,
)
from modjax.specs import imports
from tests.specs.test_imports import LAYER

LAYERS = "MoD(Mine(), causal=Predictor())"
pytestmark = pytest.mark.usefixtures("own_layers")


@pytest.fixture
def foreign(finished_workdir, tmp_path):
    """A copy of the finished run whose spec names a layer and an import that is a trap."""
    shutil.copytree(finished_workdir, tmp_path / "work")
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    (tmp_path / "trap.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nraise SystemExit(0)"
    )
    spec = json.loads((folder / "spec.json").read_text())
    spec["model"] |= {"imports": [str(tmp_path / "trap.py")], "layers": ["Dense()", LAYERS]}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def verbs(folder, tiny_data_dir):
    where = [f"--workdir={folder.parents[1]}", f"--data-dir={tiny_data_dir}"]
    return (
        ["sample", *where, "--prompt=x", f"--run={folder.name}"],
        ["eval", *where, "--routing=predictor"],
    )


def line_of(capsys, arguments) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("where", ["/nope", "runs/typo", "", "a\0b"])
def test_a_typo_in_the_folder_is_no_damage(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^modjax.load = {re.escape(repr(where))}: no such run$"):
        modjax.load(where)


def test_what_a_run_folder_names_is_not_imported(foreign, tiny_data_dir, tmp_path, capsys):
    said = [line_of(capsys, arguments) for arguments in verbs(foreign, tiny_data_dir)]
    with pytest.raises(InputError) as caught:
        modjax.load(foreign)
    for line in (*said, str(caught.value)):
        assert f"{foreign / 'spec.json'} = 'Mine': is no layer of modjax's: give the file" in line
        assert "--imports" in line and "trap.py" in line and "damaged" not in line
    assert not (tmp_path / "sprung").exists()


def test_an_import_that_fails_is_named_as_such(foreign, tiny_data_dir, tmp_path, capsys):
    trap = str(tmp_path / "trap.py")
    for arguments in verbs(foreign, tiny_data_dir):
        line = line_of(capsys, [*arguments, f"--imports={trap}"])
        (tmp_path / "sprung").rmdir()
        assert line == f"modjax: --imports = {trap!r}: cannot be imported: SystemExit: 0\n"
    with pytest.raises(InputError, match=r"^imports = .*: cannot be imported: SystemExit: 0$"):
        modjax.load(foreign, imports=[trap])
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_run_is_read_with_the_code_that_trained_it_or_by_leave(
    foreign, tiny_data_dir, tmp_path, capsys
):
    mine = tmp_path / "mine.py"
    mine.write_text(LAYER.format(name="Mine"))
    imports.import_all({"mine.py": str(mine)}, "f")
    record, run_id = read_record(foreign), read_spec(foreign).run_id
    foreign = foreign.rename(foreign.with_name(run_id))
    write_record(foreign, dataclasses.replace(record, run_id=run_id))
    write_provenance(foreign, read_provenance(foreign) | {"code of Mine": "earlier"})
    said = f"run = '{foreign.name}': had other values of code of Mine (1 runs)"
    for arguments in verbs(foreign, tiny_data_dir):
        assert said in line_of(capsys, [*arguments, f"--imports={mine}"])
    with pytest.raises(InputError, match="had other values of code of Mine"):
        modjax.load(foreign, imports=[str(mine)])
    with pytest.raises(KeyError, match="Mine"):  # it goes as far as the module, which is not there
        modjax.load(foreign, imports=[str(mine)], other_code=True)


def test_the_record_of_a_run_carries_what_its_folder_kept(finished_workdir):
    (folder,) = (finished_workdir / "runs").iterdir()
    kept = json.loads((folder / "result.json").read_text())["provenance"]
    assert kept == read_provenance(folder)
    assert (kept["devices"], kept["device"]) == ("1", "cpu") and kept["jax_enable_x64"] == "False"
    assert len(kept["code of modjax"]) == 16 and "jax" in kept and "XLA_FLAGS" in kept


def test_a_run_on_bytes_has_its_codec_without_data(finished_workdir, tiny_data_dir, tmp_path):
    (folder,) = (finished_workdir / "runs").iterdir()
    text = "aü"
    for loaded in (modjax.load(folder), modjax.load(folder, data_dir=tiny_data_dir)):
        ids = loaded.tokenizer.encode(text, "text")
        assert ids == [byte + 3 for byte in text.encode()]
        assert b"".join(loaded.tokenizer.pieces(ids)) == text.encode()
    with pytest.raises(InputError, match="no token cache here"):
        modjax.load(folder, data_dir=tmp_path)


def test_a_run_on_another_vocabulary_needs_its_data_for_the_codec(
    finished_workdir, tiny_data_dir, tmp_path, monkeypatch
):
    """The run and its cache get a tokenizer.json; its weights are not read."""
    pytest.importorskip("tokenizers")
    from tests.data.codecs.small import byte_level

    (folder,) = (finished_workdir / "runs").iterdir()
    spec = read_spec(folder)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, vocab="m.json"))
    folder, cache = tmp_path / spec.run_id, tmp_path / "tiny-m.json"
    folder.mkdir()
    write_spec(folder, spec)
    shutil.copytree(tiny_data_dir / "tiny-bytes", cache)
    values = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(values | {"vocab": "m.json"}))
    tokenizer = byte_level()
    tokenizer.save(str(cache / "tiny-1" / "tokenizer.json"))
    identities = []

    def restore(spec, folder, identity):
        identities.append(identity)
        return None, SimpleNamespace(graphdef=None), None

    monkeypatch.setattr(runs, "_restore", restore)
    assert modjax.load(folder).tokenizer is None
    found = modjax.load(folder, data_dir=tmp_path).tokenizer
    assert found.encode("a cat", "text") == tokenizer.encode("a cat").ids
    assert found.eos_ids == (1,)
    run = {"run_id": spec.run_id}
    assert identities == [run, run | {"data_fingerprint": "tiny-1"}], "weights of this data"
