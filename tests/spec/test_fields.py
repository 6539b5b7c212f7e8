"""Specs refuse what cannot be used, in one line that names the field, the value and the rule."""

import dataclasses

import pytest

from modjax.errors import InputError
from modjax.spec import (
    MLP,
    Attention,
    DataConfig,
    Dense,
    Execution,
    MoD,
    MoDConfig,
    ModelSpec,
    MoE,
    Repeat,
    RunSpec,
    Seq,
    TrainConfig,
    from_dict,
    to_dict,
)

MODEL = {"vocab_size": 40, "d_model": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2,
         "d_ff": 32}  # fmt: skip
MOE = {"experts": 4, "top_k": 2}
RECEIVED = Seq(Attention(received=True), MLP())
BY_RECEIVED = MoD(router="received")
TRAIN = {"batch_size": 8, "seq_len": 16, "steps": 10, "learning_rate": 1e-3, "warmup_steps": 1}


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
                ("slack", None, "must be of type float"),
                ("router", "moe", "must be one of expert_choice, stochastic"),
                ("weight", "relu", "must be one of linear"),
                ("slack", 0.9, "must be 1 or more"),
                ("auxiliary_weight", -0.1, "must be 0 or"),
                ("predictor_weight", -0.1, "must be 0 or"),
                ("balance_weight", -0.1, "must be 0 or"),
                ("z_weight", -0.1, "must be 0 or"),
                ("residual", "x", "must be one of delta"),
            )
        ),
        (MoD, {}, "inner", "dense", "MoD.inner = 'dense': must be of type Layer"),
        (Attention, {}, "rope", 0.0, "Attention.rope = 0.0: must be greater than 0"),
        (Attention, {}, "norm", "never", "Attention.norm = 'never': must be one of before"),
        (Attention, {}, "window", 1.5, "Attention.window = 1.5: must be of type int or None"),
        (Attention, {}, "window", 0, "Attention.window = 0: must be greater than 0, or None"),
        (Attention, {}, "softcap", -1.0, "Attention.softcap = -1.0: must be greater than 0"),
        (MLP, {}, "activation", "tanh", "MLP.activation = 'tanh': must be one of gelu"),
        (MLP, {}, "norm", "never", "MLP.norm = 'never': must be one of before"),
        *(
            (MoE, MOE, name, value, f"MoE.{name} = {value!r}: {says}")
            for name, value, says in (
                ("experts", 0, "must be greater than 0"),
                ("experts", 2.0, "must be of type int"),
                ("top_k", 0, "must be between 1 and experts = 4"),
                ("top_k", 5, "must be between 1 and experts = 4"),
                ("width", 0, "must be greater than 0, or None"),
                ("capacity_factor", 0.0, "must be greater than 0, or None: it leaves no slot"),
                ("router", "best", "must be one of token_choice, expert_choice, threshold"),
                ("scores", "relu", "must be one of softmax, sigmoid"),
                ("activation", "tanh", "must be one of gelu"),
                ("norm", "never", "must be one of before"),
                ("no_ops", -1, "must be 0 or more"),
                ("shared", -1, "must be 0 or more"),
                ("scale", 0.0, "must be greater than 0"),
                ("balance_weight", -0.1, "must be 0 or more"),
                ("z_weight", -0.1, "must be 0 or more"),
                ("bias_rate", -0.1, "must be 0 or more"),
                ("random_no_ops", True, "needs no_ops"),
            )
        ),
        *(
            (MoE, MOE | {name: value}, "router", "expert_choice", f"MoE.{name} = {value!r}: {says}")
            for name, value, says in (
                ("no_ops", 2, "must be 0 where router = 'expert_choice'"),
                ("bias_rate", 0.1, "must be 0.0 where router = 'expert_choice'"),
                ("renormalise", True, "must be False where router = 'expert_choice'"),
                ("capacity_factor", None, "must be a number where router = 'expert_choice'"),
            )
        ),
        (MoE, MOE | {"renormalise": True}, "top_k", 1, "MoE.renormalise = True: must be False at"),
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
                "needs a layer before it, in its segment, that hands on received",
            )
            for layers in (
                (BY_RECEIVED,),
                (MoD(), BY_RECEIVED),
                (Dense(), BY_RECEIVED),
                (MoD(RECEIVED), BY_RECEIVED),  # attention among some is not handed on
            )
        ),
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
        ({"layers": "Attention(rope=1e999)"}, "model.layers = inf: must be finite"),
        ({"layers": "Attention(rope=-1e999)"}, "model.layers = -inf: must be finite"),
        ({"layers": f"Attention(rope=1{'0' * 400})"}, "model.layers = 1000"),
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
    layers = (Dense(), MoD(Dense("swiglu"), capacity=0.5, router="threshold"))
    text = "Dense(), MoD(Dense('swiglu'), capacity=0.5, router='threshold')"
    as_text, as_value = (ModelSpec(**MODEL | {"layers": given}) for given in (text, layers))
    assert as_text == as_value and as_text.layers == layers
    assert ", ".join(map(str, layers)) == text
    assert from_dict(ModelSpec, to_dict(as_value)) == as_value


def test_a_whole_number_for_a_float_is_that_float_so_that_equal_layers_have_one_text():
    assert str(MoD(capacity=1, slack=2)) == str(MoD(capacity=1.0, slack=2.0))
    assert MoD(capacity=1) == MoD(capacity=1.0) and Attention(rope=10_000) == Attention()


def capacity_and_room(model):
    return tuple((layer.capacity, layer.room) for layer in model.layers if isinstance(layer, MoD))


def test_each_layer_of_a_pattern_has_a_capacity_of_its_own():
    model = ModelSpec(**MODEL | {"layers": (Dense(), MoD(), Dense(), MoD(capacity=0.5))})
    assert capacity_and_room(model) == ((0.125, 0.125), (0.5, 0.5))
    assert model.routed() == 2


def test_a_threshold_layer_has_room_for_its_slack_and_never_for_more_than_all():
    layers = (
        MoD(router="threshold", capacity=0.5, slack=1.5),
        MoD(router="threshold", capacity=0.8, slack=1.5), MoD(capacity=0.5, slack=1.5),
    )  # fmt: skip
    model = ModelSpec(**MODEL | {"layers": layers, "num_layers": 3})
    assert capacity_and_room(model) == ((0.5, 0.75), (0.8, 1.0), (0.5, 0.5))


def routed(*layers):
    return ModelSpec(**MODEL | {"layers": layers})


WHAT_EACH_CAN = [
    ((MoD(),), ("trained", "threshold")),
    ((MoD(auxiliary_weight=0.1),), ("trained", "router", "threshold")),
    ((MoD(predictor_weight=0.1),), ("trained", "predictor", "paced", "threshold")),
    # The auxiliary loss teaches expert choice only.
    ((MoD(router="stochastic", auxiliary_weight=0.1),), ("trained", "threshold")),
    ((MoD(router="learned_position", predictor_weight=1.0),),
     ("trained", "predictor", "paced", "threshold")),
    ((RECEIVED, BY_RECEIVED), ("trained",)),
    ((RECEIVED, MoD(router="received", predictor_weight=1.0)), ("trained", "predictor", "paced")),
    # Rules of their own, which need no lesson.
    ((MoD(router="positional"),), ("trained", "router", "threshold")),
    ((MoD(router="token_choice"),), ("trained", "router", "threshold")),
    ((MoD(router="token_choice", predictor_weight=1.0),),
     ("trained", "router", "predictor", "paced", "threshold")),
    ((MoD(router="threshold"),), ("trained", "threshold")),
    ((Seq(MoD(predictor_weight=0.1), MLP()),), ("trained", "predictor", "paced", "threshold")),
    ((Seq(Attention(), MoE(4, router="expert_choice")),), ("trained",)),
    # A pace counts positions, of which the inner one sees some only.
    ((MoD(MoD(predictor_weight=0.1), predictor_weight=0.1),),
     ("trained", "predictor", "threshold")),
]  # fmt: skip


@pytest.mark.parametrize("layers, can", WHAT_EACH_CAN)
def test_a_routing_that_a_layer_has_not_learned_is_refused_with_those_it_has(layers, can):
    model = routed(*layers)
    for routing in ("trained", "router", "predictor", "paced", "threshold"):
        if routing in can:
            model.check_routing(routing, "routing")
            continue
        with pytest.raises(InputError) as caught:
            model.check_routing(routing, "routing")
        message = str(caught.value)
        assert message.startswith(f"routing = '{routing}': {layers[-1]} can select by ")
        assert f"can select by {', '.join(can)};" in message and "\n" not in message
        assert "predictor_weight" in message and "auxiliary_weight" in message


def test_an_unknown_routing_is_refused_with_those_known():
    for model in (routed(MoD()), ModelSpec(**MODEL)):
        with pytest.raises(InputError) as caught:
            model.check_routing("best", "--routing")
        assert str(caught.value) == (
            "--routing = 'best': must be one of trained, router, predictor, paced, threshold"
        )


BOTH = {"auxiliary_weight": 0.1, "predictor_weight": 0.1}


@pytest.mark.parametrize(
    "layers, best",
    [
        ((Dense(),), None),
        ((MoD(),), "threshold"),
        ((MoD(auxiliary_weight=0.1),), "router"),
        ((MoD(**BOTH),), "predictor"),
        ((MoD(router="positional"), MoD(router="token_choice")), "router"),
        ((MoD(router="positional"), MoD(router="threshold")), "threshold"),
        ((RECEIVED, BY_RECEIVED), None),
        ((MoD(auxiliary_weight=0.1), MoD(router="stochastic", auxiliary_weight=0.1)), "threshold"),
        (
            (RECEIVED, MoD(router="received", auxiliary_weight=0.1), Dense(),
             MoD(auxiliary_weight=0.1)),
            None,
        ),
        (
            (RECEIVED, MoD(router="received", predictor_weight=0.1), Dense(),
             MoD(predictor_weight=0.1)),
            "predictor",
        ),
    ],
)  # fmt: skip
def test_the_best_causal_routing_is_one_that_every_layer_has_learned(layers, best):
    assert routed(*layers).causal_routing() == best
