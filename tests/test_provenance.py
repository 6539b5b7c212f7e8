"""A run records its provenance, which is checked when the run continues or is read."""

import dataclasses
import json
import logging

import jax
import pytest

from modjax import provenance as p
from modjax.errors import InputError, SharedFault
from modjax.records import read_provenance, run_dir
from modjax.specs import Execution, imports
from modjax.training.mesh import make_mesh
from tests.scaling.conftest import _record
from tests.specs.test_imports import LAYER
from tests.training.tiny import MODEL, run_spec

NOW = {"code of modjax": "aa", "code of Mine": "bb", "XLA_FLAGS": "none", "devices": "1"}


def test_a_run_goes_on_as_it_began_or_by_leave_and_its_provenance_says_so(tmp_path):
    def begin(now, *, other_code=False, write=True):
        return p.begin(tmp_path, now, write=write, other_code=other_code)

    assert begin(NOW | {"code of Mine": "fails"}) != begin(NOW) == read_provenance(tmp_path) == NOW
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert begin(NOW | {"code of Mine": "fails"}) != begin(NOW), "no state, nothing to go on with"
    (tmp_path / "checkpoints" / "1").mkdir()
    assert begin(NOW) == NOW
    other = NOW | {"code of Mine": "cc", "XLA_FLAGS": "--fast"}
    with pytest.raises(InputError) as caught:
        begin(other)
    line = str(caught.value)
    assert f"run = '{tmp_path.name}': had other values of XLA_FLAGS, code of Mine (1 runs)" in line
    assert "--other-code" in line and read_provenance(tmp_path) == NOW
    assert begin(other, other_code=True)["code of Mine"] == "bb then cc"
    assert begin(other)["code of Mine"] == "bb then cc", "it goes on as it did last"
    with pytest.raises(InputError, match="code of Mine"):
        begin(NOW)
    assert begin(other | {"devices": "8"})["devices"] == "1 then 8"
    assert begin(other | {"devices": "1"})["devices"] == "1 then 8", "each number once"
    kept = read_provenance(tmp_path)
    assert kept["devices"] == "1 then 8"
    assert begin(other | {"devices": "2"}, write=False) != kept == read_provenance(tmp_path)


def test_a_run_from_before_goes_on_and_says_what_is_not_known(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    found = p.begin(tmp_path, NOW, write=True, other_code=False)
    assert found == {name: f"not recorded then {value}" for name, value in NOW.items()}
    assert p.begin(tmp_path, NOW, write=True, other_code=False) == found
    with pytest.raises(InputError, match="code of Mine"):
        p.begin(tmp_path, NOW | {"code of Mine": "cc"}, write=True, other_code=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"devices": 3}', "3"])
def test_a_damaged_provenance_is_named(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(InputError, match=r"provenance.json = 'damaged or missing': delete it, and"):
        read_provenance(tmp_path)


@pytest.mark.usefixtures("own_layers")
def test_the_runs_that_other_code_began_are_named_and_no_others(tmp_path, caplog):
    def imported(source: str):
        (tmp_path / "own.py").write_text(source)
        for table in (imports.NAMES, imports.ORIGINS):
            table.pop("Mine", None)
        imports.import_all({"own.py": str(tmp_path / "own.py")}, "f")

    imported(LAYER.format(name="Mine"))
    mine, dense = run_spec(layers="Mine()", seed=1), run_spec()
    assert list(p.source_code(mine.model)) == ["code of modjax", "code of Mine"]
    assert list(p.source_code(dense.model)) == ["code of modjax"]
    folders = {run_dir(tmp_path, spec.run_id): spec.model for spec in (mine, dense)}
    for folder, model in folders.items():
        folder.mkdir(parents=True)
        p.begin(folder, p.source_code(model), write=True, other_code=False)
        (folder / "checkpoints" / "1").mkdir(parents=True)
    p.require_same(tmp_path, [mine, dense, run_spec(seed=9)])
    p.require_readable(folders)

    path = run_dir(tmp_path, mine.run_id) / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code of Mine": "other"}))
    for check in (
        lambda: p.require_same(tmp_path, [mine, dense]),
        lambda: p.require_readable(folders),
    ):
        with pytest.raises(InputError) as caught:
            check()
        assert mine.run_id in str(caught.value) and dense.run_id not in str(caught.value)
        assert "code of Mine (1 runs)" in str(caught.value)

    path = run_dir(tmp_path, dense.run_id) / "provenance.json"
    path.write_text(json.dumps({"code of modjax": "other", "jax": "0.1"}))
    with pytest.raises(
        InputError, match=f"run = '{dense.run_id}': had other values of code of mod"
    ):
        p.require_same(tmp_path, [dense])
    with caplog.at_level(logging.WARNING):
        p.require_readable({path.parent: dense.model})
    assert f"trained with other code of modjax than this: {dense.run_id}" in caplog.text


def test_the_number_of_devices_is_no_part_of_the_flags(monkeypatch):
    mesh = make_mesh(Execution(data=1))  # from here on, XLA reads no flags
    monkeypatch.setenv("XLA_FLAGS", f"--a=1  {p.DEVICE_COUNT}8 --b")
    assert p.provenance(MODEL, mesh)["XLA_FLAGS"] == "--a=1 --b"
    monkeypatch.setenv("XLA_FLAGS", f"{p.DEVICE_COUNT}8")
    assert p.provenance(MODEL, mesh)["XLA_FLAGS"] == "none"


def test_code_that_was_edited_under_a_sweep_is_a_fault_of_all_its_runs():
    code = p.source_code()
    p.require_unchanged(code)
    with pytest.raises(SharedFault, match="source code = 'code of modjax': was edited while"):
        p.require_unchanged(code | {"code of modjax": "other"})


def test_modjaxs_own_hash_is_of_the_code_that_computes(tmp_path, monkeypatch):
    def digest() -> str:
        p._own_source.cache_clear()
        return p._own_source()

    monkeypatch.setattr(p, "__file__", str(tmp_path / "provenance.py"))
    for name in ("sharding.py", "nn/layers/mod.py", "training/step.py", "scaling/report/page.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    first = digest()
    (tmp_path / "scaling/report/page.py").write_text("2")
    assert digest() == first
    (tmp_path / "nn/layers/mod.py").write_text("2")
    (tmp_path / "nn/.#mod.py").symlink_to("somebody@somewhere:1")  # as Emacs locks a file
    second = digest()
    (tmp_path / "nn/layers/mod.py").rename(tmp_path / "nn/layers/moe.py")
    third = digest()
    (tmp_path / "sharding.py").write_text("2")
    assert len({first, second, third, digest()}) == 4
    p._own_source.cache_clear()


def test_what_jax_is_set_to_is_set_back_and_kept():
    changed = {
        "jax_enable_x64": True,
        "jax_default_prng_impl": "rbg",
        "jax_random_seed_offset": 3,
        "jax_threefry_partitionable": False,
        "jax_default_matmul_precision": "bfloat16",
        "jax_softmax_custom_jvp": True,
        "jax_use_direct_linearize": False,
        "jax_disable_most_optimizations": True,
        "jax_optimization_level": "O0",
    }
    before = {name: jax.config.values[name] for name in changed}
    mesh = make_mesh(Execution(data=2))
    kept = p.provenance(MODEL, mesh)
    try:
        for name, value in changed.items():
            jax.config.update(name, value)
        found = p.provenance(MODEL, mesh)
        assert {name: found[name] for name in changed} == {n: str(v) for n, v in changed.items()}
        p.fix_settings()
        assert p.provenance(MODEL, mesh) == kept
        assert {name: jax.config.values[name] for name in changed} == before
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert kept["jax"] == jax.__version__ and kept["device"] == "cpu" and int(kept["cores"])
    assert kept["devices"] == "2"


def test_records_that_differ_are_named_by_what_they_differ_in():
    def record(run_id, **provenance):
        return dataclasses.replace(
            _record(run_id=run_id),
            provenance={n.replace("_", " "): v for n, v in provenance.items()},
        )

    same = [record(f"r{i}", code_of_modjax="aa", devices="1 x cpu", cores=str(i)) for i in range(5)]
    assert p.differences([]) == p.differences(same) == []
    assert p.differences([_record(), _record()]) == []
    own = record("own", code_of_modjax="aa", devices="1 x cpu", code_of_Mine="bb")
    assert p.differences([*same, own]) == [], "only one run has the layer"
    said = p.differences([*same, own, record("b", code_of_modjax="ab", devices="1 x cpu")])
    assert said == [
        "the runs differ in their code of modjax: aa (6: r0, r1, r2 and 3 more); ab (1: b)"
    ]
    assert p.differences([*same, own, _record(run_id="old")]) == [
        "not recorded: the provenance of old"
    ]
    hostile = dataclasses.replace(_record(run_id="x"), provenance={"code of modjax": [1]})
    assert "[1] (1: x)" in p.differences([*same, hostile])[0]
