"""A mask that no line of modjax knows is planned, counted, decoded, trained and reported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax import flops
from modjax.nn.cache import KVCache
from modjax.specs import MLP, Attention, Causal, MoD, ModelSpec, Predictor, Seq
from tests.nn.small import QUICK, random_model
from tests.outside.dilated import Dilated
from tests.outside.test_outside import CONFIG, run

LAYER = Seq(Attention(mask=Causal() & Dilated(6)), MLP())
SHAPE = {"vocab_size": 40, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 32}


def test_its_text_is_read_back():
    text = "Seq(Attention(mask=Causal() & Dilated(size=6)), MLP())"
    assert str(LAYER) == text and ModelSpec(**SHAPE, num_layers=1, layers=text).layers == (LAYER,)


def test_its_flops_are_those_that_xla_counts():
    """A mask saves all its hidden keys but those of one chunk of queries."""
    found = {}
    for size in (64, 640):
        layer = Seq(Attention(mask=Causal() & Dilated(size)), MLP())
        spec = ModelSpec(**SHAPE | {"d_model": 64}, num_layers=1, layers=layer)
        graphdef, params = nnx.split(
            nnx.eval_shape(lambda spec=spec: modjax.Transformer(spec, rngs=nnx.Rngs(0)))
        )
        forward = jax.jit(lambda p, x, graphdef=graphdef: nnx.merge(graphdef, p)(x)[0])
        x = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
        counted = forward.lower(params, x).compile(QUICK).cost_analysis()["flops"]
        found[size] = counted, flops.total_flops(flops.forward_flops(spec, 4096))
    saved = found[640][0] - found[64][0], found[640][1] - found[64][1]
    assert saved[0] == pytest.approx(saved[1], rel=0.1)


def test_its_cached_decoding_is_the_full_pass_in_a_ring_of_slots_also_within_mod():
    spec = ModelSpec(
        **SHAPE,
        num_layers=2,
        layers=(LAYER, MoD(LAYER, capacity=0.7, causal=Predictor())),
    )
    graphdef, params = random_model(spec, seed=3)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 20)).astype(np.int32)

    def decode(params):
        network = nnx.merge(graphdef, params)
        full, records = network(jnp.asarray(tokens), routing="causal")
        read = network.reader(max_length=20, routing="causal")
        # A prompt and a turn that are longer than the ring, then single steps.
        logits, cache, _ = read(tokens[:, :8], jnp.array([8, 2]), None)
        found = [(logits, jnp.array([7, 1]))]
        turn = np.stack([tokens[0, 8:16], tokens[1, 2:10]])
        logits, cache, _ = read(turn, jnp.array([8, 8]), cache)
        found.append((logits, jnp.array([15, 9])))
        for step in range(3):
            now = np.stack([tokens[0, 16 + step], tokens[1, 10 + step]])[:, None]
            logits, cache, _ = read(now, jnp.ones(2, jnp.int32), cache)
            found.append((logits, jnp.array([16 + step, 10 + step])))
        return full, found, cache, records["1_mod"].selected_BL

    full, found, cache, selected_BL = jax.jit(decode, compiler_options=QUICK)(params)
    assert 12 < np.sum(selected_BL) < 40
    for logits, (first, second) in found:
        np.testing.assert_allclose(logits, [full[0, first], full[1, second]], atol=1e-4, rtol=1e-4)
    held = [
        leaf
        for leaf in jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, KVCache))
        if isinstance(leaf, KVCache)
    ]
    assert [each.k_BGWH.shape for each in held] == [(2, 1, 6, 8)] * 2
    numbers = sum(each.k_BGWH.nbytes + each.v_BGWH.nbytes for each in held)
    assert numbers == 2 * flops.cache_bytes(spec, 20)


@pytest.mark.slow
def test_it_is_planned_trained_in_a_sweep_sampled_and_reported(tiny_data_dir, tmp_path):
    text = "Seq(Attention(mask=Causal() & Dilated(8)), MLP())"
    config = CONFIG.replace("tests.outside.strided", "tests.outside.dilated")
    config = config.replace("Dense(), Strided(Dense(), stride=4)", text)
    config = config.replace('"strided"', '"dilated"')
    (tmp_path / "config.py").write_text(config)
    workdir = f"--workdir={tmp_path / 'work'}"
    experiment, data = f"--config={tmp_path / 'config.py'}", f"--data-dir={tiny_data_dir}"

    def modjax_(*arguments):
        done = run(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "dilated" in modjax_("plan", experiment, data)
    assert "never looks ahead" in modjax_("check", experiment)
    modjax_("sweep", experiment, workdir, data)
    (folder,) = (tmp_path / "work" / "runs").glob("dilated-*")
    spec = json.loads((folder / "spec.json").read_text())
    assert spec["model"]["imports"] == ["tests.outside.dilated"]
    result = json.loads((folder / "result.json").read_text())
    assert result["causal_loss"] == result["eval_loss"]
    sampled = modjax_(
        "sample",
        workdir,
        data,
        f"--run={folder.name}",
        "--prompt=def",
        "--json",
        "--tokens=20",
        "--imports=tests.outside.dilated",
    )
    assert len(json.loads(sampled)[0]) > 1
    modjax_("report", workdir)
    assert "Dilated(size=8)" in (tmp_path / "work" / "report.html").read_text()
