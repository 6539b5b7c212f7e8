"""Specs refuse what cannot be used, in one line that names the field, the value and the rule."""

import dataclasses
from typing import Annotated

import pytest

from modjax.errors import InputError
from modjax.specs import (
    MLP,
    Attention,
    Binary,
    Blocks,
    DataConfig,
    Dense,
    Execution,
    ExpertChoice,
    Mask,
    MoD,
    MoDConfig,
    ModelSpec,
    MoE,
    Predictor,
    Random,
    Repeat,
    Rope,
    Rule,
    RunSpec,
    Threshold,
    TokenChoice,
    TopK,
    TrainConfig,
    Window,
    from_dict,
    to_dict,
)
from modjax.specs.fields import Accepts, Positive
from tests.specs.small import BY_RECEIVED, MODEL, RECEIVED, TRAIN


@dataclasses.dataclass(frozen=True)
class NoWay(Rule):
    """Rule that cannot select without the future."""


@pytest.mark.parametrize(
    "cls, base, field, value, says",
    [
        *(
            (cls, {}, name, value, f"MoD.{name} = {value!r}: {says}")
            for cls in (MoDConfig, MoD)
            for name, value, says in (
                ("capacity", 0.0, "must be in (0, 1]"),
                ("capacity", 1.5, "must be in (0, 1]"),
                ("capacity", "x", "must be of type float"),
                ("capacity", True, "must be of type float"),
                ("capacity", float("nan"), "must be finite"),
                ("router", "moe", "must be of type Router"),
                ("rule", None, "must be of type Rule"),
                ("rule", TokenChoice(), "must be of type Rule"),
                ("causal", "best", "must be of type Rule or None"),
                ("causal", NoWay(), "must be a rule that never looks ahead"),
                ("rule", Predictor(), "must be a rule that selects in training, such as TopK()"),
                ("causal", Binary(), "must be a rule that never looks ahead, by one score of each"),
                ("residual", "x", "must be one of delta"),
            )
        ),
        (Threshold, {}, "slack", None, "Threshold.slack = None: must be of type float"),
        (Threshold, {}, "slack", 0.9, "Threshold.slack = 0.9: must be 1 or more"),
        (Random, {}, "weight", "relu", "Random.weight = 'relu': must be one of linear"),
        (TopK, {}, "auxiliary", -0.1, "TopK.auxiliary = -0.1: must be 0 or more"),
        (Predictor, {}, "weight", 0.0, "Predictor.weight = 0.0: must be greater than 0"),
        (Binary, {}, "balance", -0.1, "Binary.balance = -0.1: must be 0 or more"),
        (Binary, {}, "z", -0.1, "Binary.z = -0.1: must be 0 or more"),
        (MoD, {}, "inner", "dense", "MoD.inner = 'dense': must be of type Layer"),
        (Rope, {}, "base", 0.0, "Rope.base = 0.0: must be greater than 0"),
        (Attention, {}, "norm", "never", "Attention.norm = 'never': must be one of before"),
        (Attention, {}, "mask", 8, "Attention.mask = 8: must be of type Mask"),
        (Window, {"size": 4}, "size", 1.5, "Window.size = 1.5: must be of type int"),
        (Blocks, {"size": 4}, "size", 0, "Blocks.size = 0: must be greater than 0"),
        (Attention, {}, "softcap", -1.0, "Attention.softcap = -1.0: must be greater than 0"),
        (MLP, {}, "activation", "tanh", "MLP.activation = 'tanh': must be one of gelu"),
        (MLP, {}, "norm", "never", "MLP.norm = 'never': must be one of before"),
        *(
            (
                MoE,
                {"experts": 4, "rule": TokenChoice(2)},
                name,
                value,
                f"MoE.{name} = {value!r}: {says}",
            )
            for name, value, says in (
                ("experts", 0, "must be greater than 0"),
                ("experts", 2.0, "must be of type int"),
                ("experts", 1, "must be at least top_k = 2"),
                ("width", 0, "must be greater than 0, or None"),
                ("capacity_factor", 0.0, "must be greater than 0, or None: it leaves no slot"),
                ("rule", "best", "must be of type ExpertRule"),
                ("rule", TopK(), "must be of type ExpertRule"),
                ("activation", "tanh", "must be one of gelu"),
                ("norm", "never", "must be one of before"),
                ("shared", -1, "must be 0 or more"),
            )
        ),
        *(
            (TokenChoice, {"top_k": 2}, name, value, f"TokenChoice.{name} = {value!r}: {says}")
            for name, value, says in (
                ("top_k", 0, "must be greater than 0"),
                ("scores", "relu", "must be one of softmax, sigmoid"),
                ("scale", 0.0, "must be greater than 0"),
                ("no_ops", -1, "must be 0 or more"),
                ("balance", -0.1, "must be 0 or more"),
                ("z", -0.1, "must be 0 or more"),
                ("bias_rate", -0.1, "must be 0 or more"),
                ("random_no_ops", True, "needs no_ops"),
            )
        ),
        (
            MoE,
            {"experts": 4, "rule": ExpertChoice()},
            "capacity_factor",
            None,
            "MoE.capacity_factor = None: must be a number where rule = ExpertChoice()",
        ),
        (
            TokenChoice,
            {"top_k": 1},
            "renormalise",
            True,
            "TokenChoice.renormalise = True: must be False at",
        ),
        (ModelSpec, MODEL, "d_model", 15, "model.d_model = 15: must be a multiple of"),
        (ModelSpec, MODEL, "num_heads", 16, "model.head_dim = 1: must be even"),
        (ModelSpec, MODEL, "head_dim", 3, "model.head_dim = 3: must be even"),
        (ModelSpec, MODEL, "head_dim", 0, "model.head_dim = 0: must be greater than 0"),
        (ModelSpec, MODEL, "num_kv_heads", 3, "model.num_kv_heads = 3: must divide"),
        (
            ModelSpec,
            MODEL,
            "layers",
            "Moe()",
            "model.layers = 'Moe': unknown; known: AltUp, Attention",
        ),
        (ModelSpec, MODEL, "layers", "MoD(Dense(), capacity=2)", "MoD.capacity = 2: must be in"),
        (ModelSpec, MODEL, "layers", "MoD(capacity='x')", "MoD.capacity = 'x': must be of type"),
        (
            ModelSpec,
            MODEL,
            "layers",
            "Dense(capacity=0.5)",
            "model.layers = 'Dense(capacity=0.5)': Dense.capacity = 0.5: unknown; known here: ",
        ),
        (ModelSpec, MODEL, "layers", (MoD(),) * 3, "model.num_layers = 4: must be a multiple"),
        (ModelSpec, MODEL, "layers", (Repeat(MoD(), times=3),), "model.num_layers = 4: must be 3"),
        (ModelSpec, MODEL, "layers", (Repeat(MoD()), Dense()), "all of them Repeat(...)"),
        (ModelSpec, MODEL, "layers", (), "model.layers = (): must name a layer"),
        *(
            (
                ModelSpec,
                MODEL,
                "layers",
                layers,
                "needs an earlier layer of its segment that passes on received",
            )
            for layers in (
                (BY_RECEIVED,),
                (MoD(), BY_RECEIVED),
                (Dense(), BY_RECEIVED),
                (MoD(RECEIVED), BY_RECEIVED),  # attention among some is not passed on
            )
        ),
        (ModelSpec, MODEL, "dtype", "int8", "model.dtype = 'int8': must be one of float32"),
        (ModelSpec, MODEL, "d_ff", 0, "model.d_ff = 0: must be greater than 0"),
        (TrainConfig, TRAIN, "accumulation", 3, "train.accumulation = 3: must divide"),
        (TrainConfig, TRAIN, "warmup_steps", 11, "train.warmup_steps = 11: must be between"),
        (TrainConfig, TRAIN, "b2", 1.0, "train.b2 = 1.0: must be in [0, 1)"),
        (TrainConfig, TRAIN, "learning_rate", -1.0, "train.learning_rate = -1.0: must be greater"),
        (DataConfig, {}, "max_epochs", 0.0, "data.max_epochs = 0.0: must be greater than 0"),
        (Execution, {}, "remat", "some", "execution.remat = 'some': must be auto, none, full"),
        (Execution, {}, "fsdp", -1, "execution.fsdp = -1: must be 0 (the fewest) or more"),
        (Execution, {}, "tensor", 0, "execution.tensor = 0: must be greater than 0"),
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
        ({"layers": 3}, "model.layers = 3: must be layers, or all of them Repeat"),
        ({"layers": "Dense"}, "model.layers = 'Dense': must be calls such as MoD(Dense())"),
        ({"layers": "Dense("}, "model.layers = 'Dense(': must be calls such as Dense()"),
        *(
            ({"layers": layers}, f"model.layers = {layers!r}: must name each field once")
            for layers in (
                "MoD(Dense(), **{'capacity': 0.25})",
                "MoD(Dense(), capacity=0.5, capacity=0.9)",
                "Attention(**{})",
            )
        ),
        ({"layers": "Attention(rope=Rope(1e999))"}, "model.layers = inf: must be finite"),
        ({"layers": "Attention(rope=Rope(-1e999))"}, "model.layers = -inf: must be finite"),
        ({"layers": f"Attention(rope=Rope(1{'0' * 400}))"}, "model.layers = 1000"),
        ({"norm_eps": float("nan")}, "model.norm_eps = nan: must be finite"),
        ({"norm_eps": 10**400}, "model.norm_eps = 1000"),
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


@dataclasses.dataclass(frozen=True)
class Comb(Mask):
    """Spec from outside, whose annotations say what it accepts."""

    size: Positive[int]
    every: Annotated[float | None, Accepts("must be whole", lambda n: n == int(n))] = None


@pytest.mark.parametrize(
    "values, says",
    [
        ((0,), "Comb.size = 0: must be greater than 0"),
        ((None,), "Comb.size = None: must be of type int"),
        ((3, 0.5), "Comb.every = 0.5: must be whole, or None"),
        ((3, "x"), "Comb.every = 'x': must be of type float or None"),
    ],
)
def test_an_annotation_says_what_a_field_accepts(values, says):
    assert str(Comb(3, 2)) == "Comb(size=3, every=2.0)" and Comb(3).every is None
    with pytest.raises(InputError) as caught:
        Comb(*values)
    assert str(caught.value) == says


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


def test_a_layer_given_as_text_is_the_same_as_the_value():
    layers = (Dense(), MoD(Dense("swiglu"), capacity=0.5, rule=Threshold()))
    text = "Dense(), MoD(Dense('swiglu'), capacity=0.5, rule=Threshold())"
    as_text, as_value = (ModelSpec(**MODEL | {"layers": given}) for given in (text, layers))
    assert as_text == as_value and as_text.layers == layers
    assert ", ".join(map(str, layers)) == text
    assert from_dict(ModelSpec, to_dict(as_value)) == as_value


def test_a_whole_number_for_a_float_is_that_float_so_that_equal_layers_have_one_text():
    assert str(MoD(capacity=1, rule=Threshold(slack=2))) == str(
        MoD(capacity=1.0, rule=Threshold(slack=2.0))
    )
    assert MoD(capacity=1) == MoD(capacity=1.0) and Attention(rope=Rope(10_000)) == Attention()
