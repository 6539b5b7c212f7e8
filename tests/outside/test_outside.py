"""A layer that no line of modjax knows is planned, counted, trained, decoded and reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax import flops
from modjax.nn import TokenLoss, losses
from modjax.specs import Dense, MoD, ModelSpec
from tests.outside.strided import Strided

ROOT = Path(__file__).parents[2]
SHAPE = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "d_ff": 32,
}
CONFIG = """
import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272, "imports": ("tests.outside.strided",)}
    config.train = {"seq_len": 32, "eval_sequences": 16}
    config.data = {"name": "tiny", "max_epochs": 100.0}
    config.execution = {"log_every": 5, "data": 1}
    config.sweep = {
        "arms": {
            "dense": {"layers": "Dense()"},
            "mod": {"layers": "Dense(), MoD(Dense(), capacity=0.25, causal=Predictor())"},
            "strided": {"layers": "Dense(), Strided(Dense(), stride=4)"},
        },
        "baseline": "dense", "budgets": (6e8,), "sizes": 1, "spread": 0.3,
        "optimum": {"budget": 6e8, "params": 3e3, "exponent": 0.5},
        "shape": {"width_multiple": 4, "head_dim": 4, "aspect": 8.0, "layer_multiple": 2},
        "recipe": {"batch_size": 4, "learning_rate": 0.1, "warmup_fraction": 0.1},
        "flops_per_second": 1e9,
    }
    return config
"""


LOOKS_AHEAD = """
import dataclasses

import jax.numpy as jnp

import modjax
from modjax.nn import LayerModule, Out, make_param
from modjax.specs import Cost


@dataclasses.dataclass(frozen=True)
class RowMean(modjax.Layer):
    def cost(self, shape, load):
        yield Cost("mean", params=shape.d_model)


class RowMeanModule(LayerModule):
    def __init__(self, spec, shape, *, rngs):
        self.gain = make_param(jnp.zeros(shape.d_model), ("embed",))

    def __call__(self, x, at, call, cache=None):
        return Out(x + self.gain[...] * jnp.mean(x, axis=1, keepdims=True))


modjax.register(RowMean, RowMeanModule)
"""


def run(cache, *arguments):
    """Runs `modjax ARGUMENTS...` with its caches in the folder `cache`."""
    return subprocess.run(
        [sys.executable, "-m", "modjax.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache / "cache")},
    )


def model(layers, **changes):
    return ModelSpec(**SHAPE | changes, layers=layers)


def test_its_text_is_read_back():
    layers = (Dense(), MoD(Strided(Dense(), stride=2), capacity=0.5))
    text = ", ".join(map(str, layers))
    assert text == "Dense(), MoD(Strided(Dense(), stride=2), capacity=0.5)"
    assert model(text).layers == layers


def test_its_flops_are_those_that_xla_counts():
    found = {}
    for name, layers in {"dense": (Dense(),), "strided": (Strided(Dense(), stride=8),)}.items():
        spec = model(layers, d_model=64, d_ff=256, vocab_size=512)
        graphdef, params = nnx.split(modjax.Transformer(spec, rngs=nnx.Rngs(0)))

        def run(params, tokens, graphdef=graphdef):
            return nnx.merge(graphdef, params)(tokens)[0]

        tokens = jnp.zeros((1, 128), jnp.int32)
        counted = jax.jit(run).lower(params, tokens).compile().cost_analysis()["flops"]
        found[name] = counted, flops.total_flops(flops.forward_flops(spec, 128))
    saved = found["dense"][0] - found["strided"][0], found["dense"][1] - found["strided"][1]
    assert saved[0] == pytest.approx(saved[1], rel=0.05)


def test_its_cached_decoding_is_the_full_pass_and_reads_a_turn_at_once():
    spec = model((Dense(), Strided(Dense(), stride=3)))
    network = modjax.Transformer(spec, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 14)).astype(np.int32)
    full = network(jnp.asarray(tokens), routing="causal")[0]
    read = network.reader(max_length=14, routing="causal")
    logits, cache, depths = read(tokens[:, :5], jnp.array([5, 4]), None)
    np.testing.assert_array_equal(depths, [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]])
    turn = np.stack([tokens[0, 5:10], tokens[1, 4:9]])
    logits, cache, _ = read(turn, jnp.array([5, 5]), cache)
    np.testing.assert_allclose(logits, [full[0, 9], full[1, 8]], atol=1e-5)
    for step in range(3):
        now = np.stack([tokens[0, 10 + step], tokens[1, 9 + step]])[:, None]
        logits, cache, _ = read(now, jnp.ones(2, jnp.int32), cache)
        np.testing.assert_allclose(logits, [full[0, 10 + step], full[1, 9 + step]], atol=1e-5)


@pytest.mark.slow
def test_inside_mod_its_own_loss_reaches_the_objective_and_its_gain_a_gradient():
    spec = model((MoD(Strided(Dense(), stride=2), capacity=0.5),))
    graphdef, params = nnx.split(modjax.Transformer(spec, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 16)))

    @jax.grad
    def own(params):
        _, records = nnx.merge(graphdef, params)(tokens)
        assert set(records) == {"0_mod", "0_mod/rule", "0_mod/inner"}
        return losses({"0_mod/inner": records["0_mod/inner"]}, TokenLoss(jnp.zeros((2, 16))))

    gain = own(params)["stack"]["blocks"]["0_mod"]["inner"]["gain"]
    assert np.abs(np.asarray(gain[...])).max() > 0


@pytest.mark.slow
def test_it_trains_in_a_sweep_beside_dense_and_mod_and_is_sampled_and_reported(
    tiny_data_dir, tmp_path
):
    config, workdir = tmp_path / "config.py", tmp_path / "work"
    config.write_text(CONFIG)
    common = [f"--workdir={workdir}", f"--data-dir={tiny_data_dir}"]

    def modjax_(*arguments):
        done = run(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "strided" in modjax_("plan", f"--config={config}", f"--data-dir={tiny_data_dir}")
    modjax_("sweep", f"--config={config}", *common)
    runs = {folder.name.split("-")[0]: folder for folder in (workdir / "runs").iterdir()}
    assert set(runs) == {"dense", "mod", "strided"}
    text = (runs["strided"] / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["strided/update"] > 0
    dense, routed = (json.loads((runs[n] / "spec.json").read_text()) for n in ("dense", "strided"))
    assert (dense["model"]["imports"], routed["model"]["imports"]) == (
        [],
        ["tests.outside.strided"],
    )
    sampled = modjax_(
        "sample",
        *common,
        f"--run={runs['strided'].name}",
        "--prompt=def",
        "--json",
        "--tokens=8",
        "--routing=causal",
        "--imports=tests/outside/strided.py",
    )
    assert json.loads(sampled)[0]["routed_blocks"] >= 1
    # It skips by a rule of its own that never looks ahead: its loss is the one to sample by.
    result = json.loads((runs["strided"] / "result.json").read_text())
    assert result["causal_routing"] == "trained"
    assert result["causal_loss"] == result["eval_loss"]
    modjax_("report", f"--workdir={workdir}", "--loss=causal")
    assert re.search("Strided\\(Dense\\(\\), stride=4\\)", (workdir / "report.html").read_text())
    assert list(result["provenance"])[:2] == ["code of modjax", "code of Strided"]
    loaded = modjax.load(runs["strided"])
    assert loaded.spec.model.layers[1] == Strided(Dense(), stride=4)


@pytest.mark.slow
def test_a_layer_that_looks_ahead_is_refused_before_anything_is_trained(tiny_data_dir, tmp_path):
    (tmp_path / "looks_ahead.py").write_text(LOOKS_AHEAD)
    config = CONFIG.replace("tests.outside.strided", "looks_ahead.py")
    config = config.replace("Strided(Dense(), stride=4)", "MoD(RowMean(), capacity=0.5)")
    (tmp_path / "config.py").write_text(config)
    experiment = f"--config={tmp_path / 'config.py'}"
    where = [f"--workdir={tmp_path / 'work'}", f"--data-dir={tiny_data_dir}"]
    checked = run(tmp_path, "check", experiment)
    swept = run(tmp_path, "sweep", experiment, *where)
    assert (checked.returncode, swept.returncode) == (2, 2)
    for done in (checked, swept):
        last = done.stderr.splitlines()[-1]
        assert "MoD(RowMean(), capacity=0.5)" in last and "where it claims not to" in last
    assert re.search(r"^Dense\(\) +trained +never looks ahead +nothing moves", checked.stdout, re.M)
    assert not (tmp_path / "work" / "runs").exists()
