"""Runs that start from a pretrained model, also with its blocks wrapped or its MLPs copied."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from modjax import InputError, Transformer, save_pretrained
from modjax.pretrained import model_fields, pretrained_spec
from modjax.scaling.plan import experiment
from modjax.specs import (
    DataConfig,
    Execution,
    Logits,
    MoD,
    ModelSpec,
    Predictor,
    RunSpec,
    Tied,
    TrainConfig,
)
from modjax.training.base_weights import check_base, initial_state, new_weights
from modjax.training.mesh import make_mesh
from modjax.training.state import abstract_model

ATTENTION = "Attention(rope=Rope(500.0))"
BLOCK = f"Seq({ATTENTION}, MLP('swiglu'))"
MODEL = ModelSpec(
    vocab_size=64,
    d_model=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    layers=BLOCK,
    head=Tied(),
)


def spec_of(base, trained="all", **changes):
    model = ModelSpec(**(vars(MODEL) | changes))
    train = TrainConfig(2, 16, 3, 1e-3, 1, trained=trained)
    return RunSpec("x", 1e9, model, train, DataConfig(), str(base))


def started(base, trained="all", **changes):
    """Returns the spec of a run and its state before the first step."""
    spec = spec_of(base, trained, **changes)
    mesh, model = make_mesh(Execution(data=1)), abstract_model(spec.model, trained)
    check_base(spec, model)
    with jax.set_mesh(mesh):
        return spec, initial_state(mesh, model, spec)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the folder of a pretrained model, and its weights by depth."""
    folder = tmp_path_factory.mktemp("base") / "model"
    weights = nnx.to_pure_dict(nnx.state(Transformer(MODEL, rngs=nnx.Rngs(3))))
    save_pretrained(folder, MODEL, weights)
    return folder, weights["stack"]["blocks"]["0_seq"]["parts"]


def test_wrapped_blocks_keep_their_weights_and_routers_are_new(base):
    folder, theirs = base
    layers = f"{BLOCK}, MoD({BLOCK}, capacity=0.5, causal=Predictor())"
    spec, state = started(folder, "routers", layers=layers)
    blocks = state.frozen["stack"]["blocks"]
    ours = blocks["0_seq"]["parts"], blocks["1_mod"]["inner"]["parts"]
    for part, name in (("0_attention", "w_q"), ("0_attention", "w_out"), ("1_mlp", "w_gate")):
        for first, half in enumerate(ours):
            np.testing.assert_array_equal(half[part][name], theirs[part][name][first::2])
    new = set(new_weights(spec))
    assert {"stack.blocks.1.router.w", "stack.blocks.3.causal.w_in"} <= new
    assert not any("parts" in name or "table" in name for name in new)
    assert list(state.params["stack"]["blocks"]) == ["1_mod"], "nothing else is trained"


def test_each_expert_starts_as_the_mlp(base):
    folder, theirs = base
    moe = "MoE(3, TokenChoice(2, renormalise=True), activation='swiglu')"
    spec, state = started(folder, layers=f"Seq({ATTENTION}, {moe})")
    experts = state.params["stack"]["blocks"]["0_seq"]["parts"]["1_moe"]["experts"]
    for name in ("w_in", "w_gate", "w_out"):
        copies = np.repeat(np.asarray(theirs["1_mlp"][name])[:, None], 3, axis=1)
        np.testing.assert_array_equal(experts[name], copies)
    assert new_weights(spec) == [f"stack.blocks.{i}.parts.1_moe.router.w" for i in range(4)]


def test_a_config_takes_its_model_from_the_files(base):
    folder, _ = base
    assert model_fields(folder, lambda i, block: block)["d_ff"] == 48
    fields = model_fields(folder, lambda i, block: MoD(block, causal=Predictor()))
    model = ModelSpec(**fields)
    spec = RunSpec("x", 1e9, model, spec_of(folder).train, DataConfig(), str(folder))
    check_base(spec, abstract_model(model))
    assert model.routed() == 4 and pretrained_spec(folder).routed() == 0


def test_the_config_of_the_repository_wraps_every_other_block(base):
    folder, _ = base
    config = Path(__file__).parents[2] / "configs" / "pretrained.py"
    (spec,) = experiment.load(f"{config}:{folder}").specs
    assert [type(block) is MoD for block in spec.model.blocks()] == [False, True] * 2
    assert (spec.base, spec.data.vocab) == (str(folder), "model.json")
    check_base(spec, abstract_model(spec.model, "routers"))


def test_the_config_of_router_tuning_routes_the_second_half_without_the_last(base):
    folder, _ = base
    config = Path(__file__).parents[2] / "configs" / "router_tuning.py"
    (spec,) = experiment.load(f"{config}:{folder}", ["train.objective=base"]).specs
    routed = ["Skip(" in str(block) for block in spec.model.blocks()]
    assert routed == [False, True, True, False]
    tokens = spec.train.batch_size * spec.train.seq_len
    assert (spec.train.trained, tokens, spec.train.weight_decay) == ("routers", 512, 0)
    check_base(spec, abstract_model(spec.model, "routers"))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"layers": "Dense('swiglu')"}, "'Attention()': must be Attention(rope=Rope(base=500.0))"),
        ({"layers": f"Seq({ATTENTION}, MLP('geglu'))"}, "must be MLP(activation='swiglu')"),
        ({"layers": f"Seq({ATTENTION}, MoE(4))"}, "must be MLP(activation='swiglu')"),
        ({"layers": f"{ATTENTION}, MLP('swiglu')"}, "attentions and MLPs = 4: must be 8"),
        ({"d_ff": 32}, "model.d_ff = 32: must be 48"),
        ({"norm_eps": 1e-5}, "model.norm_eps = 1e-05: must be 1e-06"),
        ({"norm_offset": 1.0}, "model.norm_offset = 1.0: must be 0.0"),
        ({"embed": "Tokens(scale=True)"}, "model.embed = 'Tokens(scale=True)': must be Tokens()"),
        ({"head": Logits()}, "model.tied = False: must be True"),
    ],
)
def test_a_model_that_computes_other_numbers_is_refused(base, changes, says):
    with pytest.raises(InputError) as caught:
        started(base[0], **changes)
    assert says in str(caught.value) and str(base[0]) in str(caught.value)
