"""`modjax export`: finished runs as models of Hugging Face."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.cli.main import main
from modjax.records import read_record, run_dir
from modjax.specs import Attention, Dense, Execution, MoE, Seq, TokenChoice
from modjax.training.loop import train
from tests.training.tiny import run_spec

RULE = TokenChoice(top_k=2, renormalise=True)
EXPERTS = MoE(4, RULE, activation="swiglu", capacity_factor=None)
ARMS = {
    "llama": Dense(),  # an MLP without a gate, which llama has with a gate of ones
    "mixtral": Seq(Attention(), EXPERTS),
}
TOKENS = np.random.default_rng(0).integers(3, 259, (2, 24))


@pytest.fixture(scope="module")
def exported(tiny_data_dir, tmp_path_factory):
    """Returns the folder of each arm's run, and the folder that it was exported to."""
    workdir, found = tmp_path_factory.mktemp("runs"), {}
    jax.config.update("jax_disable_most_optimizations", True)
    for family, layer in ARMS.items():
        spec = run_spec(layers=(layer,), steps=3)
        folder, out = run_dir(workdir, spec.run_id), workdir / family
        train(spec, Execution(data=1), run_dir=folder, data_dir=tiny_data_dir)
        where = [f"--workdir={workdir}", f"--data-dir={tiny_data_dir}", f"--run={spec.run_id}"]
        assert main(["export", *where, f"--out={out}"]) == 0
        found[family] = folder, out
    jax.config.update("jax_disable_most_optimizations", False)
    return found


def logits_of(graphdef, weights):
    routing = "token_choice" if "experts" in str(jax.tree.structure(weights)) else "trained"
    logits = jax.jit(lambda weights: nnx.merge(graphdef, weights)(TOKENS, routing=routing)[0])
    return logits(weights)


@pytest.mark.parametrize("family", ARMS)
def test_an_exported_run_is_read_back_with_the_same_logits(exported, family):
    folder, out = exported[family]
    run, back = modjax.load(folder), modjax.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    ours, theirs = logits_of(run.graphdef, run.weights), logits_of(back.graphdef, back.weights)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", ARMS)
def test_transformers_computes_the_same_from_the_files(exported, family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, out = exported[family]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    run = modjax.load(folder)
    np.testing.assert_allclose(logits_of(run.graphdef, run.weights), expected, atol=2e-5)


def test_the_model_card_says_what_the_run_is(exported):
    folder, out = exported["llama"]
    record, card = read_record(folder), (out / "README.md").read_text()
    for said in (record.run_id, "`Dense()`", f"{record.params_total:,}", f"{record.eval_loss:.4f}"):
        assert said in card
    assert f"`{record.data_fingerprint}`" in card and "id = byte + 3" in card


def test_routed_layers_are_refused(finished_workdir, tiny_data_dir, capsys, tmp_path):
    where = [f"--workdir={finished_workdir}", f"--data-dir={tiny_data_dir}"]
    assert main(["export", *where, f"--out={tmp_path / 'new'}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "model.layers = 'MoD(Dense(), capacity=0.25" in err and "cannot be exported" in err
    assert "`modjax tune` writes tuned routers to a file beside their base" in err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_refused(exported, capsys):
    folder, out = exported["llama"]
    where = [f"--workdir={folder.parents[1]}", f"--run={folder.name}", f"--out={out}"]
    assert main(["export", *where]) == 2
    assert "must be an empty folder, or a new one" in capsys.readouterr().err


def test_experts_that_no_family_weighs_alike_are_refused(tmp_path):
    # transformers' Mixtral divides the weights of a position's experts by their sum, always.
    raw = Seq(Attention(), MoE(4, TokenChoice(top_k=2), activation="swiglu", capacity_factor=None))
    spec = run_spec(layers=(raw,)).model
    with pytest.raises(modjax.InputError, match=r"TokenChoice\(top_k=2.*no model of llama, .*"):
        modjax.save_pretrained(tmp_path / "new", spec, {})
