"""Routers and rules from outside are planned, counted, trained, decoded and reported like ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax import flops
from modjax.nn import TokenLoss, losses
from modjax.specs import Attention, Dense, MoD, ModelSpec, MoE, Predictor, Seq
from tests.nn.small import QUICK, random_model
from tests.outside.neighbours import Neighbours
from tests.outside.rising import Rising
from tests.outside.sampled import Sampled
from tests.outside.test_outside import CONFIG, run

LENGTH, PROMPT = 14, 4
LAYERS = {
    "a router with context": MoD(Dense(), capacity=0.5, router=Neighbours()),
    "its predictor": MoD(Dense(), capacity=0.5, router=Neighbours(width=2), causal=Predictor()),
    "its experts": Seq(Attention(), MoE(4, router=Neighbours())),
    "within MoD": MoD(MoD(Dense(), capacity=0.5, router=Neighbours()), capacity=0.7),
    "a rule": MoD(Dense(), capacity=0.5, rule=Rising()),
    "by reward": MoD(Dense(), capacity=0.5, rule=Sampled()),
}


def model(layer, **changes):
    shape = {"d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 32} | changes
    return ModelSpec(40, num_layers=2, layers=(Dense(), layer), **shape)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_its_text_is_read_back(layer):
    assert model(str(layer)).layers[-1] == layer


PACED = MoD(MoD(capacity=0.5, causal=Predictor()), capacity=0.7, causal=Predictor())


@pytest.mark.parametrize(
    "layer, routing",
    [
        *((layer, "causal") for layer in LAYERS.values()),
        pytest.param(PACED, "paced", marks=pytest.mark.slow),
    ],
    ids=[*LAYERS, "a pace within a pace"],
)
def test_cached_decoding_is_the_full_pass(layer, routing):
    config, key = model(layer), jax.random.key(1)
    graphdef, params = random_model(config, std=0.5, seed=3)
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, LENGTH)))

    def both(params):
        network = nnx.merge(graphdef, params)
        full_BLV, records = network(tokens_BL, key=key, routing=routing)
        read = network.reader(max_length=LENGTH, routing=routing, key=key)
        # Prompts of 4 and 3 tokens, a turn of 5, and then token by token.
        first_BV, cache, _ = read(tokens_BL[:, :PROMPT], jnp.array([4, 3]), None)
        turn_BL = jnp.stack([tokens_BL[0, 4:9], tokens_BL[1, 3:8]])
        found = [first_BV]
        more_BV, cache, _ = read(turn_BL, jnp.array([5, 5]), cache)
        found.append(more_BV)
        for step in range(4):
            now_BL = jnp.stack([tokens_BL[0, 9 + step], tokens_BL[1, 8 + step]])[:, None]
            now_BV, cache, _ = read(now_BL, jnp.ones(2, jnp.int32), cache)
            found.append(now_BV)
        return full_BLV, jnp.stack(found), records

    full_BLV, found_SBV, records = jax.device_get(jax.jit(both, compiler_options=QUICK)(params))
    for row, end in ((0, 3), (1, 2)):
        places = [end, end + 5, *range(end + 6, end + 10)]
        np.testing.assert_allclose(found_SBV[:, row], full_BLV[row, places], atol=1e-4)
    selected = [r.selected_BL for r in records.values() if hasattr(r, "selected_BL")]
    assert all(0 < mask_GBL.mean() < 1 for mask_GBL in selected)


def test_the_flops_of_a_router_are_those_that_xla_counts():
    found = {}
    for name, layer in {"ours": MoD(), "theirs": MoD(router=Neighbours(width=64))}.items():
        config = model(layer, d_model=64)
        graphdef, params = nnx.split(modjax.Transformer(config, rngs=nnx.Rngs(0)))
        step = jax.jit(lambda p, t, g=graphdef: nnx.merge(g, p)(t)[0])
        step = step.lower(params, jnp.zeros((1, 128), jnp.int32))
        counted = step.compile().cost_analysis()["flops"]
        found[name] = counted, flops.total_flops(flops.forward_flops(config, 128))
    more = [theirs - ours for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
    assert more[0] == pytest.approx(more[1], rel=0.1)


def test_a_reward_reaches_the_router_and_its_baseline_follows_the_loss():
    layer = LAYERS["by reward"]
    graphdef, params = random_model(model(layer), std=0.3)
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, LENGTH)))
    nll_BL = np.random.default_rng(1).random((2, LENGTH)).astype(np.float32)
    weights_BL = (np.arange(LENGTH) < 10).astype(np.float32) * np.ones((2, 1), np.float32)
    tokens = TokenLoss(jnp.asarray(nll_BL), jnp.asarray(weights_BL))

    def own(params):
        records = nnx.merge(graphdef, params)(tokens_BL, key=jax.random.key(0))[1]
        return losses(records, tokens), records

    grads, records = jax.jit(jax.grad(own, has_aux=True))(params)
    pure = nnx.to_pure_dict(grads)["stack"]["blocks"]["1_mod"]
    record = records["1_mod/rule"]
    drawn_BL = np.asarray(records["1_mod"].requested_BL[0])
    chance_BL, old = np.asarray(record.chance_BL[0]), float(record.baseline_B[0, 0])
    # d loss / d score = -weight (baseline - nll) (drawn - chance), averaged over what counts.
    slope_BL = -0.01 * (old - nll_BL) * (drawn_BL - chance_BL) * weights_BL / weights_BL.sum()
    assert np.abs(slope_BL).max() > 1e-5 and np.abs(pure["router"]["w"]).max() > 1e-6
    eps = 1e-2
    moved = dataclasses.replace(record, log_odds_BL=record.log_odds_BL + eps)
    change = float(losses({"r": moved}, tokens) - losses({"r": record}, tokens))
    expected = -0.01 * eps * ((old - nll_BL) * weights_BL).sum() / weights_BL.sum()
    assert change == pytest.approx(expected, rel=1e-3)
    measured = {"1_mod": {"rule": {"baseline": jnp.full((1, 1), old)}}}
    new, _ = modjax.observe(measured, {"1_mod/rule": record}, 3, tokens, stacked=True)
    mean = (nll_BL * weights_BL).sum() / weights_BL.sum()
    assert float(new["1_mod"]["rule"]["baseline"][0, 0]) == pytest.approx(old + (mean - old) / 4)


@pytest.mark.slow
def test_they_train_in_a_sweep_and_are_sampled_and_reported(tiny_data_dir, tmp_path):
    names = ("neighbours", "rising", "sampled")
    imports = ", ".join(f'"tests.outside.{name}"' for name in names)
    arms = {
        "neighbours": "Dense(), MoD(Dense(), capacity=0.5, router=Neighbours())",
        "rising": "Dense(), MoD(Dense(), capacity=0.5, rule=Rising())",
        "sampled": "Dense(), MoD(Dense(), capacity=0.5, rule=Sampled())",
    }
    more = "".join(f'"{name}": {{"layers": "{layers}"}},\n' for name, layers in arms.items())
    text = CONFIG.replace('"tests.outside.strided",', f"{imports},")
    strided = '            "strided": {"layers": "Dense(), Strided(Dense(), stride=4)"},\n'
    assert strided in text
    config = tmp_path / "config.py"
    config.write_text(text.replace(strided, more))
    where = [f"--workdir={tmp_path / 'work'}", f"--data-dir={tiny_data_dir}"]
    done = run(tmp_path, "sweep", f"--config={config}", *where)
    assert done.returncode == 0, done.stderr
    runs = {folder.name.split("-")[0]: folder for folder in (tmp_path / "work/runs").iterdir()}
    assert set(runs) == {"dense", "mod", *names}
    ours = [f"--imports=tests/outside/{name}.py" for name in names]
    for name, rule in zip(names, ("threshold", "rising", "sampled"), strict=True):
        result = json.loads((runs[name] / "result.json").read_text())
        assert result["causal_routing"] == rule and result["causal_loss"] > 0
        drawn = run(
            tmp_path,
            "sample",
            *where,
            f"--run={runs[name].name}",
            "--prompt=def",
            "--json",
            "--tokens=8",
            *ours,
        )
        assert json.loads(drawn.stdout)[0]["routed_blocks"] >= 1, drawn.stderr
    assert 0 < result["outcome"]["trained/sampled/chance"] < 1
    line = json.loads((runs["sampled"] / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["sampled/chance"] < 1
    report = run(tmp_path, "report", f"--workdir={tmp_path / 'work'}", "--loss=causal")
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "work/report.html").read_text()
    assert "trained/sampled/chance" in page and "Neighbours()" in page
