"""Routers files: the weights that a model has beyond its pretrained base."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("safetensors", reason="the extra `pretrained`")

import modjax
from modjax.nn.weights import named_weights
from modjax.pretrained import model_fields, open_files, save_routers
from modjax.pretrained.files import fingerprint
from modjax.specs import (
    DataConfig,
    Execution,
    MoD,
    ModelSpec,
    Predictor,
    RunSpec,
    Seq,
    Skip,
    TrainConfig,
)
from modjax.training.base_weights import initial_state
from modjax.training.mesh import make_mesh
from modjax.training.state import abstract_model, joined
from tests.pretrained.models.small_models import Case, shard, write

CASES = {
    "llama": Case("llama"),  # new: routers, predictors and thresholds
    "mixtral": Case("mixtral", dtype="bfloat16"),  # training changes the base's own routers, too
}


def routed(i, block):
    attention, mlp = block.parts
    found = {1: MoD(block, capacity=0.5, causal=Predictor()), 2: Seq(Skip(attention), mlp)}
    return found.get(i, block)


def trained(folder):
    """Returns the spec, the graph definition and the weights of a run as after some steps."""
    model = ModelSpec(**model_fields(folder, routed))
    train = TrainConfig(2, 16, 3, 1e-3, 1, trained="routers")
    spec = RunSpec("x", 1e9, model, train, DataConfig(), str(folder))
    mesh, about = make_mesh(Execution(data=1)), abstract_model(model, "routers")
    with jax.set_mesh(mesh):
        state = initial_state(mesh, about, spec)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(
        lambda x: x + rng.normal(size=x.shape).astype(np.float32), (state.params, state.measured)
    )
    return model, about.graphdef, joined(moved[0], state.frozen, moved[1])


def saved(folder, name):
    """Returns the folder of a base, a routers file, and the model whose routers it holds."""
    write(folder, CASES[name])
    model = trained(folder)
    save_routers(folder / "routers.safetensors", model[0], model[2], folder)
    return folder, folder / "routers.safetensors", model


@pytest.fixture(scope="module", params=CASES)
def tuned(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("whole"), "llama")


@pytest.fixture
def llama(whole, tmp_path):
    """Returns the folder of a base and a routers file, to be harmed."""
    folder = shutil.copytree(whole[0], tmp_path / "llama")
    return folder, folder / "routers.safetensors"


def same_bits(ours, theirs):
    def same(one, other):
        assert one.dtype == other.dtype and one.shape == other.shape
        return np.asarray(one).tobytes() == np.asarray(other).tobytes()

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    return all(jax.tree.leaves(jax.tree.map(same, ours, theirs)))


def test_a_base_with_its_routers_is_the_tuned_model_to_the_bit(tuned):
    folder, file, (spec, _, weights) = tuned
    found = modjax.from_pretrained(folder, routers=file)
    assert found.spec == spec and found.tokenizer is None
    assert same_bits(found.weights, weights)


def test_each_device_reads_its_part_of_the_routers(tuned):
    folder, file, (_, _, weights) = tuned
    mesh = make_mesh(Execution(data=2, fsdp=4))
    found = modjax.from_pretrained(folder, routers=file, mesh=mesh)
    assert same_bits(found.weights, weights)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found.weights)} == {8}


def test_the_file_holds_what_the_base_does_not(tuned):
    from safetensors import safe_open

    folder, file, (_, graphdef, weights) = tuned
    named = named_weights(nnx.merge(graphdef, weights))
    new = {n for n in named if ".causal." in n or ".router." in n or n.endswith("threshold")}
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == new and len(new) >= 9
        for name in opened.keys():
            np.testing.assert_array_equal(opened.get_tensor(name), named[name])
            assert opened.get_tensor(name).dtype == np.float32
        about = json.loads(opened.metadata()["modjax"])
    assert about.keys() == {"model", "base", "version"}
    assert "MoD(" in "".join(about["model"]["layers"])
    assert about["base"] == fingerprint(open_files(folder))
    assert file.stat().st_size < 100_000


def test_the_dtype_to_compute_in_leaves_routers_in_float32(llama):
    folder, file = llama
    found = modjax.from_pretrained(folder, routers=file, dtype="bfloat16")
    assert found.spec.dtype == "bfloat16"
    block = found.weights["stack"]["blocks"]["1_mod"]
    assert block["router"]["w"].dtype == jnp.float32
    assert block["causal"]["w_in"].dtype == jnp.float32
    assert block["inner"]["parts"]["1_mlp"]["w_in"].dtype == jnp.bfloat16


def changed(folder, name, at):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][at] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_fingerprint_follows_from_the_tensors_alone(tmp_path):
    write(tmp_path, Case("llama"))
    found = {fingerprint(open_files(tmp_path))}
    assert all(len(digest) == 16 for digest in found)
    shard(tmp_path)
    assert fingerprint(open_files(tmp_path)) in found
    for case in (Case("llama", dtype="bfloat16"), Case("mistral"), Case("llama")):
        for file in tmp_path.iterdir():
            file.unlink()
        write(tmp_path, case)
        found.add(fingerprint(open_files(tmp_path)))
    # A llama and a mistral of these sizes have the same tensors.
    assert len(found) == 2
    changed(tmp_path, "model.norm.weight", 31)
    found.add(fingerprint(open_files(tmp_path)))
    changed(tmp_path, "model.layers.2.mlp.up_proj.weight", (0, 31))
    found.add(fingerprint(open_files(tmp_path)))
    assert len(found) == 4


def rewritten(file, change):
    """Rewrites a routers file by change(tensors, metadata)."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(file, framework="numpy") as opened:
        about = json.loads(opened.metadata()["modjax"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    change(tensors, about)
    save_file(tensors, file, {"modjax": json.dumps(about)})


def swap(model, old, new):
    model["layers"] = [text.replace(old, new) for text in model["layers"]]


W = "stack.blocks.1.router.w"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, about: t.pop(W), f"tensors = '.*routers.*': 1 missing: {W}"),
        (lambda t, about: t.update(x=t[W]), "1 unexpected: x"),
        (lambda t, about: t.update({W: t[W][1:]}), "1 of another shape: .*(31, 1).*not (32, 1)"),
        (lambda t, about: t.update({W: t[W] * np.nan}), f"{W}.*: has numbers that are not finite"),
        (lambda t, about: about.update(model="{"), "must be a routers file.*group of fields"),
        (lambda t, about: about.pop("base"), r"must be a routers file.*KeyError: 'base'"),
        (lambda t, about: about.update(base="0" * 16), "base = '0{16}': are routers of another"),
        (
            lambda t, about: swap(about["model"], "MoD", "Mod"),
            "must be a routers file, .*model.layers = 'Mod': unknown; known",
        ),
        (
            lambda t, about: swap(about["model"], "swiglu", "geglu"),
            r"model.layers = .*geglu.*: must be MLP\(activation='swiglu'\)",
        ),
    ],
)
def test_a_routers_file_that_does_not_fit_is_refused(llama, change, said):
    folder, file = llama
    rewritten(file, change)
    with pytest.raises(modjax.InputError, match=said.replace("(3", r"\(3").replace("1)", r"1\)")):
        modjax.from_pretrained(folder, routers=file)


def test_routers_of_another_base_are_refused_with_both_fingerprints(llama):
    folder, file = llama
    before = fingerprint(open_files(folder))
    changed(folder, "model.norm.weight", 0)
    with pytest.raises(modjax.InputError) as caught:
        modjax.from_pretrained(folder, routers=file)
    said = str(caught.value)
    assert before in said and fingerprint(open_files(folder)) in said and "\n" not in said


@pytest.mark.parametrize("content", [None, b"", b"no tensors", "model"])
def test_a_file_that_is_no_routers_file_is_refused(llama, content):
    folder, file = llama
    file.unlink()
    if content == "model":
        file = folder / "model.safetensors"
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(modjax.InputError, match=r"routers = '.*: must be a routers file") as caught:
        modjax.from_pretrained(folder, routers=file)
    assert "\n" not in str(caught.value)


def test_routers_are_not_saved_beside_a_base_that_does_not_fit(whole, tmp_path):
    folder, _, (spec, _, weights) = whole
    other = dataclasses.replace(spec, norm_eps=1e-3)
    with pytest.raises(modjax.InputError, match=r"model.norm_eps = 0.001: must be 0.0003"):
        save_routers(tmp_path / "new", other, weights, folder)
    assert not (tmp_path / "new").exists()
