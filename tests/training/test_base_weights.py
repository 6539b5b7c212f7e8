"""Runs that start from another's weights, and frozen weights, which checkpoints leave out."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from modjax.errors import InputError
from modjax.finished.runs import load
from modjax.records import read_record, write_record
from modjax.scaling.plan import experiment
from modjax.specs import Dense, Execution, MoD, Predictor
from modjax.training.base_weights import fingerprint, initial_state
from modjax.training.checkpoint import Checkpoints, read_checkpoint
from modjax.training.loop import train
from modjax.training.mesh import make_mesh
from modjax.training.state import abstract_model, abstract_state, joined
from tests.training.tiny import run_spec

pytestmark = pytest.mark.slow
ONE = Execution(data=1)
LAYERS = (Dense(), MoD(Dense(), capacity=0.25, causal=Predictor()))
FIELDS = {"layers": LAYERS, "dtype": "bfloat16", "steps": 3, "eval_sequences": 8}


def trained(folder, data_dir, **changes):
    """Trains a run from the weights in the folder `base`, and returns its folder and its spec."""
    base = changes.pop("base", None)
    spec = dataclasses.replace(run_spec(**FIELDS | changes), base=base and str(base))
    train(spec, ONE, run_dir=folder / spec.run_id, data_dir=data_dir)
    return folder / spec.run_id, spec


@pytest.fixture(scope="module")
def base(tiny_data_dir, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("base"), tiny_data_dir)


@pytest.fixture(scope="module")
def routers(base, tiny_data_dir, tmp_path_factory):
    """A run that trains only the routers of the base."""
    changes = {"trained": "routers", "base": base[0]}
    return trained(tmp_path_factory.mktemp("routers"), tiny_data_dir, **changes)


def leaves(weights):
    found = jax.tree_util.tree_leaves_with_path(weights)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in found}


def is_router(path):
    return "/router/" in path or "/causal/" in path


def test_the_frozen_weights_are_the_bases_in_the_dtype_of_the_model(base, routers):
    theirs, ours = (leaves(load(folder).weights) for folder, _ in (base, routers))
    assert ours.keys() == theirs.keys() and sum(map(is_router, ours)) == 4
    for path, weight in ours.items():
        if is_router(path):
            assert weight.dtype == np.float32 and np.any(weight != theirs[path])
        elif not path.endswith("threshold"):
            assert weight.dtype == jnp.bfloat16
            np.testing.assert_array_equal(weight, theirs[path].astype(jnp.bfloat16))


def test_a_checkpoint_holds_what_is_trained(base, routers):
    def numbers(folder):
        files = (folder / "checkpoints").rglob("*")
        return sum(path.stat().st_size for path in files if "ocdbt.process" in str(path))

    whole = sum(weight.nbytes for weight in leaves(load(base[0]).weights).values())
    part = [x.nbytes for p, x in leaves(load(routers[0]).weights).items() if is_router(p)]
    assert sum(part) < whole / 10
    assert numbers(routers[0]) < numbers(base[0]) / 4  # the rest is orbax's own index


def test_a_run_with_frozen_weights_goes_on_from_its_checkpoint(routers, tiny_data_dir, tmp_path):
    folder, spec = tmp_path / routers[1].run_id, routers[1]
    shutil.copytree(routers[0], folder)
    (folder / "result.json").unlink()
    again = train(spec, ONE, run_dir=folder, data_dir=tiny_data_dir)
    assert again.eval_loss == read_record(routers[0]).eval_loss


def test_a_base_that_has_changed_is_refused(base, routers, tiny_data_dir, tmp_path):
    folder, spec = base
    moved = tmp_path / folder.name
    shutil.copytree(folder, moved)
    other = dataclasses.replace(routers[1], base=str(moved))
    assert other.run_id == routers[1].run_id  # it is named by its run, not by its folder
    ours = tmp_path / "routers" / other.run_id
    shutil.copytree(routers[0], ours)
    spec_file = ours / "spec.json"
    spec_file.write_text(spec_file.read_text().replace(str(folder), str(moved)))
    load(ours)

    split, mesh = abstract_model(spec.model), make_mesh(ONE)
    last = moved / "checkpoints" / str(spec.train.steps)
    fingerprint_of_data = read_record(moved).data_fingerprint
    identity = {"run_id": spec.run_id, "data_fingerprint": fingerprint_of_data}
    state, seconds = read_checkpoint(last, abstract_state(mesh, split, spec.train), identity)
    shutil.rmtree(last)
    checkpoints = Checkpoints(moved / "checkpoints", keep=1, identity=identity)
    params = {**state.params, "embed": {"table": state.params["embed"]["table"] * 1.01}}
    checkpoints.save(spec.train.steps, state._replace(params=params), seconds)
    checkpoints.close()
    with pytest.raises(InputError, match="the frozen weights have changed since"):
        load(ours)


def test_the_seeds_own_weights_are_made_again(tiny_data_dir, tmp_path):
    folder, spec = trained(tmp_path, tiny_data_dir, trained="routers", seed=3)
    mesh, model = make_mesh(ONE), abstract_model(spec.model, "routers")
    with jax.set_mesh(mesh):
        state = initial_state(mesh, model, spec)
        drawn = leaves(joined(state.params, state.frozen))
    found = leaves(load(folder).weights)
    for path, weight in drawn.items():
        assert np.array_equal(found[path], weight) is not is_router(path)


@pytest.mark.parametrize(
    "harm, said",
    [
        ("missing", "base = '.*': must be the folder of a finished run"),
        ("unfinished", "the run has not finished"),
        ("diverged", "the run has no final weights"),
        ("shape", "base = '.*': must have the weights of this model; other shapes: .*causal"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_anything_starts(
    base, tiny_data_dir, tmp_path, harm, said
):
    folder = tmp_path / base[0].name
    changes = {"layers": (Dense(), MoD(Dense(), capacity=0.25))} if harm == "shape" else {}
    if harm != "missing":
        shutil.copytree(base[0], folder)
    if harm == "unfinished":
        (folder / "result.json").unlink()
    if harm == "diverged":
        record = read_record(folder)
        write_record(folder, dataclasses.replace(record, status="diverged", diverged_step=2))
    with pytest.raises(InputError, match=said):
        trained(tmp_path, tiny_data_dir, base=folder, **changes)
    assert {path.name for path in tmp_path.iterdir()} <= {folder.name}


def test_a_fingerprint_sees_each_bit_and_each_place():
    one = jnp.arange(12.0).reshape(3, 4)
    others = [
        one.at[1, 2].set(np.nextafter(np.float32(6), np.float32(7))),
        one.T.reshape(3, 4),
        one.astype(jnp.bfloat16),
        one[::-1],
        one.reshape(4, 3),
    ]
    assert len({fingerprint({"a": x}) for x in (one, *others)} | {fingerprint({"b": one})}) == 7
    over = NamedSharding(make_mesh(Execution(data=2, fsdp=2)), PartitionSpec(None, "fsdp"))
    assert fingerprint({"a": jax.device_put(one, over)}) == fingerprint({"a": one})


def test_a_config_of_a_single_run_names_its_base(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[2] / "configs"
    (spec,) = experiment.load(str(configs / "single.py"), ["base=runs/one"]).specs
    assert spec.base == os.path.realpath("runs/one")
    assert spec.run_id == dataclasses.replace(spec, base="/elsewhere/one").run_id
    assert spec.run_id != dataclasses.replace(spec, base=None).run_id
    with pytest.raises(InputError, match=r"--config\.base = 'runs/one': unknown"):
        experiment.load(str(configs / "tiny.py"), ["base=runs/one"])
