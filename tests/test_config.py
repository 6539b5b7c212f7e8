"""Configs refuse what cannot be used, in one line that names the field, the value and the rule."""

import dataclasses

import pytest

from modjax.errors import InputError
from modjax.spec import (
    DataConfig,
    Execution,
    MoDConfig,
    ModelSpec,
    RunSpec,
    Slot,
    TrainConfig,
    from_dict,
    to_dict,
)

MODEL = {"vocab_size": 40, "d_model": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2,
         "d_ff": 32}  # fmt: skip
TRAIN = {"batch_size": 8, "seq_len": 16, "steps": 10, "learning_rate": 1e-3, "warmup_steps": 1}


@pytest.mark.parametrize(
    "cls, base, field, value, says",
    [
        (MoDConfig, {}, "capacity", 0.0, "model.mod.capacity = 0.0: must be in (0, 1]"),
        (MoDConfig, {}, "capacity", 1.5, "model.mod.capacity = 1.5: must be in (0, 1]"),
        (MoDConfig, {}, "weight", "relu", "model.mod.weight = 'relu': must be one of linear"),
        (MoDConfig, {}, "slack", 0.9, "model.mod.slack = 0.9: must be 1 or more"),
        *(
            (MoDConfig, {}, f"{name}_weight", -0.1, f"model.mod.{name}_weight = -0.1: must be 0 or")
            for name in ("auxiliary", "predictor", "balance", "z")
        ),
        (MoDConfig, {}, "residual", "x", "model.mod.residual = 'x': must be one of delta"),
        (ModelSpec, MODEL, "d_model", 15, "model.d_model = 15: must be a multiple of"),
        (ModelSpec, MODEL, "num_heads", 16, "model.num_heads = 16: must leave an even head"),
        (ModelSpec, MODEL, "num_kv_heads", 3, "model.num_kv_heads = 3: must divide"),
        (ModelSpec, MODEL, "pattern", ("moe",), "model.pattern = 'moe': must be one of dense"),
        (ModelSpec, MODEL, "pattern", ("mod:2",), "model.pattern = 'mod:2': takes a capacity"),
        (ModelSpec, MODEL, "pattern", ("mod:x",), "model.pattern = 'mod:x': takes a capacity"),
        (ModelSpec, MODEL, "pattern", ("dense:0.5",), "for routed blocks only"),
        (ModelSpec, MODEL, "pattern", ("mod",) * 3, "model.num_layers = 4: must be a multiple"),
        (ModelSpec, MODEL, "pattern", (), "model.pattern = (): must name a block"),
        (ModelSpec, MODEL, "pattern", ("attention",), "the dense block that must come right"),
        (ModelSpec, MODEL, "pattern", ("mod", "attention"), "('mod', 'attention'): an attention"),
        (ModelSpec, MODEL, "dtype", "int8", "model.dtype = 'int8': must be one of float32"),
        (ModelSpec, MODEL, "d_ff", 0, "model.d_ff = 0: must be greater than 0"),
        (TrainConfig, TRAIN, "accumulation", 3, "train.accumulation = 3: must divide"),
        (TrainConfig, TRAIN, "warmup_steps", 11, "train.warmup_steps = 11: must be between"),
        (TrainConfig, TRAIN, "b2", 1.0, "train.b2 = 1.0: must be in [0, 1)"),
        (TrainConfig, TRAIN, "learning_rate", -1.0, "train.learning_rate = -1.0: must be greater"),
        (DataConfig, {}, "max_epochs", 0.0, "data.max_epochs = 0.0: must be greater than 0"),
        (Execution, {}, "remat", "some", "execution.remat = 'some': must be one of none"),
        (Execution, {}, "fsdp", 0, "execution.fsdp = 0: must be greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(cls, base, field, value, says):
    cls(**base)
    with pytest.raises(InputError) as caught:
        cls(**base | {field: value})
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"d_modle": 16}, "model.d_modle = 16: unknown; known here: vocab_size"),
        ({"d_model": "wide"}, "model.d_model = 'wide': must be of type int"),
        ({"d_model": True}, "model.d_model = True: must be of type int"),
        ({"d_model": 16.5}, "model.d_model = 16.5: must be of type int"),
        ({"pattern": "mod"}, "model.pattern = 'mod': must be a list"),
        ({"mod": 3}, "model.mod = 3: must be a group of fields"),
        ({"rope_base": float("nan")}, "model.rope_base = nan: must be finite"),
        ({"rope_base": 10**400}, "model.rope_base = 1000"),
    ],
)
def test_a_mapping_is_checked_by_name_and_type(values, says):
    with pytest.raises(InputError) as caught:
        from_dict(ModelSpec, MODEL | values, "model.")
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("values", [None, 7, "x", [1, 2], [["d_model", 3]]])
def test_what_is_no_mapping_is_named_by_what_it_should_be(values):
    with pytest.raises(InputError, match=r"^ModelSpec = .*: must be a group of fields"):
        from_dict(ModelSpec, values)


def test_a_field_of_names_and_values_must_be_one():
    @dataclasses.dataclass(frozen=True)
    class Named:
        flops: dict[str, float]
        seed: int | None = None

    assert from_dict(Named, {"flops": {"mlp": 1.0}}) == Named({"mlp": 1.0})
    with pytest.raises(InputError, match="flops = 5: must be a group of fields"):
        from_dict(Named, {"flops": 5})
    assert from_dict(Named, {"flops": {}, "seed": None}).seed is None
    with pytest.raises(InputError, match=r"seed = '3': must be of type int \| None"):
        from_dict(Named, {"flops": {}, "seed": "3"})


def test_a_missing_value_without_default_is_named():
    with pytest.raises(InputError, match=r"model\.d_ff = None: missing"):
        from_dict(ModelSpec, {k: v for k, v in MODEL.items() if k != "d_ff"}, "model.")


def spec(budget, **changes):
    model = ModelSpec(**MODEL | changes)
    return RunSpec("dense", budget, model, TrainConfig(**TRAIN), DataConfig())


def test_a_run_is_named_by_its_values_and_survives_json():
    assert from_dict(RunSpec, to_dict(spec(1e9))) == spec(1e9)
    assert spec(10**9).run_id == spec(1e9).run_id
    assert len({spec(1e9).run_id, spec(2e9).run_id, spec(1e9, d_ff=64).run_id}) == 3
    assert spec(1e9).run_id.startswith("dense-1e09-d16-l4-")


def test_a_pattern_gives_each_slot_its_capacity():
    model = ModelSpec(**MODEL | {"pattern": ("dense", "mod", "dense", "mod:0.5")})
    assert model.slots == (
        Slot("dense", 1.0, 1.0), Slot("mod", 0.125, 0.125), Slot("dense", 1.0, 1.0),
        Slot("mod", 0.5, 0.5),
    )  # fmt: skip


def test_a_threshold_block_has_room_for_its_slack_and_never_for_more_than_all():
    mod = MoDConfig(capacity=0.5, slack=1.5)
    model = ModelSpec(**MODEL | {"pattern": ("threshold", "threshold:0.8", "mod"), "mod": mod,
                                   "num_layers": 3})  # fmt: skip
    assert model.slots == (
        Slot("threshold", 0.5, 0.75), Slot("threshold", 0.8, 1.0), Slot("mod", 0.5, 0.5),
    )  # fmt: skip


def routed(*pattern, **mod):
    return ModelSpec(**MODEL | {"pattern": pattern, "mod": MoDConfig(**mod)})


WHAT_EACH_CAN = [
    (("mod",), {}, ("top_k", "threshold")),
    (("mod",), {"auxiliary_weight": 0.1}, ("top_k", "threshold", "router")),
    (("mod",), {"predictor_weight": 0.1}, ("top_k", "threshold", "predictor", "paced")),
    # The auxiliary loss teaches expert choice only.
    (("stochastic",), {"auxiliary_weight": 0.1}, ("top_k", "threshold")),
    (("learned_position",), {"predictor_weight": 1.0},
     ("top_k", "threshold", "predictor", "paced")),
    (("dense", "attention"), {}, ("top_k",)),
    (("dense", "attention"), {"predictor_weight": 1.0}, ("top_k", "predictor", "paced")),
    # Rules of their own, which need no lesson.
    (("positional",), {}, ("top_k", "threshold", "router")),
    (("token_choice",), {}, ("top_k", "threshold", "router")),
    (("token_choice",), {"predictor_weight": 1.0},
     ("top_k", "threshold", "router", "predictor", "paced")),
    (("threshold",), {}, ("top_k", "threshold")),
]  # fmt: skip


@pytest.mark.parametrize("pattern, mod, can", WHAT_EACH_CAN)
def test_a_routing_that_a_block_has_not_learned_is_refused_with_those_it_has(pattern, mod, can):
    model = routed(*pattern, **mod)
    for routing in ("top_k", "router", "predictor", "paced", "threshold"):
        if routing in can:
            model.check_routing(routing, "routing")
            continue
        with pytest.raises(InputError) as caught:
            model.check_routing(routing, "routing")
        message = str(caught.value)
        assert message.startswith(f"routing = '{routing}': {pattern[-1]} blocks")
        assert f"can select by {', '.join(can)};" in message and "\n" not in message
        assert "predictor_weight" in message and "auxiliary_weight" in message


def test_an_unknown_routing_is_refused_with_those_known():
    for model in (routed("mod"), ModelSpec(**MODEL)):
        with pytest.raises(InputError) as caught:
            model.check_routing("best", "--routing")
        assert str(caught.value) == (
            "--routing = 'best': must be one of top_k, router, predictor, paced, threshold"
        )


@pytest.mark.parametrize(
    "pattern, mod, best",
    [
        (("dense",), {}, None),
        (("mod",), {}, "threshold"),
        (("mod",), {"auxiliary_weight": 0.1}, "router"),
        (("mod",), {"auxiliary_weight": 0.1, "predictor_weight": 0.1}, "predictor"),
        (("positional", "token_choice"), {}, "router"),
        (("positional", "threshold"), {}, "threshold"),
        (("dense", "attention"), {}, None),
        (("mod", "stochastic"), {"auxiliary_weight": 0.1}, "threshold"),
        (("dense", "attention", "dense", "mod"), {"auxiliary_weight": 0.1}, None),
        (("dense", "attention", "dense", "mod"), {"predictor_weight": 0.1}, "predictor"),
    ],
)
def test_the_best_causal_routing_is_one_that_every_block_has_learned(pattern, mod, best):
    assert routed(*pattern, **mod).causal_routing() == best
