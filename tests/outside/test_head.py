"""A head that no line of modjax knows is planned, counted, trained, decoded and reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax import flops
from modjax.nn.layers import ends
from modjax.specs import Dense, ModelSpec
from modjax.specs.layer import NAMES
from modjax.training.step import next_token
from tests.nn.small import random_model
from tests.outside.factored import Factored
from tests.outside.test_outside import CONFIG, model, run
from tests.training.tiny import QUICK, random_batch


def test_its_text_is_read_back():
    spec = model(Dense(), head="Factored(rank=8)")
    assert spec.head == Factored(8)
    assert str(spec.head) == "Factored(rank=8)" and NAMES["Factored"] is Factored


def test_its_flops_are_those_that_xla_counts_and_its_parameters_those_that_it_has():
    spec = ModelSpec(512, 64, 1, 1, 1, 64, "MLP()", head=Factored(32))
    network = nnx.eval_shape(lambda: modjax.Transformer(spec, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(network)
    tokens = jnp.zeros((1, 128), jnp.int32)
    found = {}
    for name, door in (("all", "__call__"), ("features", "features")):

        def forward(params, door=door):
            return getattr(nnx.merge(graphdef, params), door)(tokens)[0]

        found[name] = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    costs = flops.forward_flops(spec, 128)
    expected = costs["logits"] + costs["bias"]
    assert found["all"] - found["features"] == pytest.approx(expected, rel=0.05)
    counted = flops.parameters(spec)
    assert counted["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counted["total"] - counted["non_embedding"] == 512 * 64 + 32 * (64 + 512) + 512


def test_its_cached_decoding_is_the_full_pass():
    graphdef, params = random_model(model(Dense(), head=Factored(8)))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)

    def run(params):
        network = nnx.merge(graphdef, params)
        read = network.reader(max_length=9, routing="causal")
        logits, cache, _ = read(tokens[:, :5], jnp.array([5, 5]), None)
        found = [logits]
        for step in range(5, 9):
            now = tokens[:, step : step + 1], jnp.ones(2, jnp.int32)
            logits, cache, _ = read(*now, cache)
            found.append(logits)
        return network(tokens)[0], jnp.stack(found, axis=1)

    full, cached = jax.jit(run, compiler_options=QUICK)(params)
    np.testing.assert_allclose(cached, full[:, 4:], rtol=1e-4, atol=1e-5)


def test_its_loss_is_computed_in_chunks_with_the_gradients_of_the_whole(monkeypatch):
    network = modjax.Transformer(model(modjax.MLP(), head=Factored(8)), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(network)
    batch = random_batch(0, 2, 16, vocab=40)

    def loss(params):
        return jnp.sum(next_token(nnx.merge(graphdef, params), batch)[0] * batch.weights_BL)

    def found():
        return jax.jit(jax.value_and_grad(lambda p: loss(p)), compiler_options=QUICK)(params)

    whole = found()
    monkeypatch.setattr(ends, "MOST_NUMBERS", 2 * 5 * 40)
    for ours, theirs in zip(jax.tree.leaves(found()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_trains_in_a_sweep_beside_other_heads_and_is_sampled_and_reported(
    tiny_data_dir, tmp_path
):
    config, workdir = tmp_path / "config.py", tmp_path / "work"
    text = CONFIG.replace("tests.outside.strided", "tests.outside.factored")
    text = text.replace('"dense": {"layers": "Dense()"},', '"dense": {},')
    begin, end = text.index('            "mod"'), text.index('        },\n        "baseline"')
    arms = '            "tied": {"head": "Tied()"}, "factored": {"head": "Factored(rank=2)"},\n'
    config.write_text(text[:begin] + arms + text[end:])
    common = [f"--workdir={workdir}", f"--data-dir={tiny_data_dir}"]

    def modjax_(*arguments):
        done = run(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "factored" in modjax_("plan", f"--config={config}", f"--data-dir={tiny_data_dir}")
    modjax_("sweep", f"--config={config}", *common)
    runs = {folder.name.split("-")[0]: folder for folder in (workdir / "runs").iterdir()}
    assert set(runs) == {"dense", "tied", "factored"}
    imports = {n: json.loads((runs[n] / "spec.json").read_text())["model"]["imports"] for n in runs}
    assert imports == {"dense": [], "tied": [], "factored": ["tests.outside.factored"]}
    result = json.loads((runs["factored"] / "result.json").read_text())
    assert list(result["provenance"])[:2] == ["code of modjax", "code of Factored"]
    sampled = modjax_(
        "sample",
        *common,
        f"--run={runs['factored'].name}",
        "--prompt=def",
        "--json",
        "--tokens=8",
        "--imports=tests/outside/factored.py",
    )
    assert json.loads(sampled)[0]["text"] is not None
    modjax_("report", f"--workdir={workdir}")
    assert "Factored(rank=2)" in (workdir / "report.html").read_text()
    assert modjax.load(runs["factored"]).spec.model.head == Factored(2)
