"""Configs refuse what cannot be used, in one line that names the field, the value and the rule."""

import pytest

from modjax.config import (
    DataConfig,
    Execution,
    InputError,
    MoDConfig,
    ModelConfig,
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
        (MoDConfig, {}, "residual", "x", "model.mod.residual = 'x': must be one of delta"),
        (ModelConfig, MODEL, "d_model", 15, "model.d_model = 15: must be a multiple of"),
        (ModelConfig, MODEL, "num_heads", 16, "model.num_heads = 16: must leave an even head"),
        (ModelConfig, MODEL, "num_kv_heads", 3, "model.num_kv_heads = 3: must divide"),
        (ModelConfig, MODEL, "pattern", ("moe",), "model.pattern = 'moe': must be one of dense"),
        (ModelConfig, MODEL, "pattern", ("mod:2",), "model.pattern = 'mod:2': takes a capacity"),
        (ModelConfig, MODEL, "pattern", ("mod:x",), "model.pattern = 'mod:x': takes a capacity"),
        (ModelConfig, MODEL, "pattern", ("dense:0.5",), "for routed blocks only"),
        (ModelConfig, MODEL, "pattern", ("mod",) * 3, "model.num_layers = 4: must be a multiple"),
        (ModelConfig, MODEL, "pattern", (), "model.pattern = (): must name a block"),
        (ModelConfig, MODEL, "dtype", "int8", "model.dtype = 'int8': must be one of float32"),
        (ModelConfig, MODEL, "d_ff", 0, "model.d_ff = 0: must be greater than 0"),
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
    ],
)
def test_a_mapping_is_checked_by_name_and_type(values, says):
    with pytest.raises(InputError) as caught:
        from_dict(ModelConfig, MODEL | values, "model.")
    assert str(caught.value).startswith(says)


def test_a_missing_value_without_default_is_named():
    with pytest.raises(InputError, match=r"model\.d_ff = None: missing"):
        from_dict(ModelConfig, {k: v for k, v in MODEL.items() if k != "d_ff"}, "model.")


def spec(budget, **changes):
    model = ModelConfig(**MODEL | changes)
    return RunSpec("dense", budget, model, TrainConfig(**TRAIN), DataConfig())


def test_a_run_is_named_by_its_values_and_survives_json():
    assert from_dict(RunSpec, to_dict(spec(1e9))) == spec(1e9)
    assert spec(10**9).run_id == spec(1e9).run_id
    assert len({spec(1e9).run_id, spec(2e9).run_id, spec(1e9, d_ff=64).run_id}) == 3
    assert spec(1e9).run_id.startswith("dense-1e09-d16-l4-")


def test_a_pattern_gives_each_slot_its_capacity():
    model = ModelConfig(**MODEL | {"pattern": ("dense", "mod", "dense", "mod:0.5")})
    assert model.slots == (
        Slot("dense", 1.0, 1.0), Slot("mod", 0.125, 0.125), Slot("dense", 1.0, 1.0),
        Slot("mod", 0.5, 0.5),
    )  # fmt: skip
