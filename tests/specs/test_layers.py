"""Specs as values: their text, their canonical form, what they refuse, and their shapes."""

import dataclasses

import pytest

from modjax.errors import InputError
from modjax.flops import parameters
from modjax.specs import (
    MLP,
    Attention,
    DataConfig,
    Dense,
    Layer,
    MoD,
    ModelSpec,
    MoE,
    Repeat,
    Rope,
    Router,
    RunSpec,
    Seq,
    TrainConfig,
    canonical,
    from_dict,
    to_dict,
)

SHAPE = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 6,
    "num_heads": 2,
    "num_kv_heads": 2,
    "d_ff": 32,
}


def model(layers, **changes):
    return ModelSpec(**SHAPE | changes, layers=layers)


TEXTS = [
    "Dense()",
    "Dense('swiglu')",
    "Seq(Attention(rope=Rope(scaling=Interpolated(factor=4.0)), bias='qkv'), MLP(bias=True))",
    "Attention(rope=None, qk_norm='head', clip=8.0, scale=0.1)",
    "MLP(), Attention(rope=Rope(share=0.5, scaling=Divided((1.0, 2.0), (2.0, 4.0), context=9)))",
    "Attention(rope=Rope(scaling=Yarn(factor=4.0, context=64, magnitude=1.1)))",
    "Attention(rope=Rope(scaling=ByWavelength(factor=8.0, low=1.0, high=4.0, context=64)))",
    "Dense(), MoD(Dense(), capacity=0.5, causal=Predictor())",
    "MoD(MoD(Seq(Attention(softcap=30.0), MLP('geglu', norm='both')), capacity=0.5))",
    "Seq(MoD(Attention(rope=Rope(base=1000.0)), rule=Binary()), MLP())",
    "Seq(Attention(received=True), MLP()), MoD(Dense(), router=Received(), rule=TopK('one'))",
    "Repeat(Dense(), times=1), Repeat(MoD(Dense())), Repeat(Dense(), Dense(), times=1)",
    "MoD(Seq(Attention(), MoE(8, TokenChoice(2, no_ops=4, renormalise=True))), capacity=0.25)",
    "Seq(Attention(), MoE(8, TokenChoice(scores='sigmoid', bias_rate=0.1), capacity_factor=None))",
    "Repeat(Dense(), times=1), Repeat(SequenceAltUp(MoD(), stride=2)), Repeat(Dense(), times=1)",
    "StrideSkip(), StridePool(Dense(), stride=8)",
    "Attention(mask=Causal() & Window(8)), MoD(Attention(mask=Causal() & (Window(8) & Blocks(6))))",
    "Attention(mask=Prefix(4))",
    "Attention(mask=Bidirectional())",
]
ON_STREAMS = [
    ("AltUp(Dense()), AltUp(MoD(), active=1, learned=False)", "Recycled(2)"),
    ("Seq(HyperConnection(Attention(), dynamic=True), HyperConnection(MLP()))", "Full(3)"),
    ("ManifoldHyperConnection(Dense(), active=1)", "Recycled(2)"),
    ("Gemma3nAltUp(Dense()), SimplifiedAltUp(Dense(), active=3)", "Projected(4)"),
]


@pytest.mark.parametrize("text, streams", [*((text, None) for text in TEXTS), *ON_STREAMS])
def test_the_text_of_layers_is_read_back_to_the_same_layers(text, streams):
    layers = model(text, streams=streams).layers
    written = ", ".join(map(str, layers))
    assert model(written, streams=streams).layers == layers
    assert ", ".join(map(str, model(written, streams=streams).layers)) == written
    config = model(text, streams=streams)
    spec = RunSpec("x", 1e9, config, TrainConfig(8, 16, 10, 1e-3, 1), DataConfig())
    assert from_dict(RunSpec, to_dict(spec)) == spec
    assert from_dict(RunSpec, to_dict(spec)).run_id == spec.run_id


@pytest.mark.parametrize(
    "text, says",
    [
        ("Mole(Dense())", "model.layers = 'Mole': unknown; known: AltUp, Attention"),
        (
            "MoD(Dense(), size=3)",
            "model.layers = 'MoD(Dense(), size=3)': MoD.size = 3: unknown; known here: inner, cap",
        ),
        ("Repeat(Dense(), time=3)", "Repeat.time = 3: unknown; known here: parts, times"),
        ("MoE()", "model.layers = 'MoE()': MoE.__init__() missing 1 required positional argument"),
        ("MoD(Dense(), capacity=2)", "MoD.capacity = 2: must be in (0, 1]"),
        ("MoD(3)", "MoD.inner = 3: must be of type Layer"),
        ("__import__('os').system('true')", "model.layers = "),
        ("Dense", "model.layers = 'Dense': must be calls such as MoD(Dense())"),
        ("Dense(", "model.layers = 'Dense(': must be calls such as Dense(), MoD(Dense())"),
        ("", "model.layers = '': must be calls"),
        ("Seq()", "Seq = (): must contain a layer"),
        ("Repeat(Dense()), Dense()", "must be layers, or all of them Repeat(...)"),
        ("Repeat(Dense()), Repeat(Dense())", "must leave `times` open in one segment at most"),
        ("Repeat(Dense(), times=5)", "model.num_layers = 6: must be 5, the sum of its segments"),
        (
            "Repeat(Dense(), times=1), Repeat(Dense(), Dense())",
            "model.num_layers = 6: must be 1 and",
        ),
        ("Repeat(Dense(), times=0)", "Repeat.times = 0: must be greater than 0"),
        ("Dense(), Dense(), Dense(), Dense()", "model.num_layers = 6: must be a multiple of the"),
        ("Attention(norm='never')", "Attention.norm = 'never': must be one of before, after, both"),
        ("Attention(mask=Window(0))", "Window.size = 0: must be greater than 0"),
        ("Attention(mask=Dense())", "Attention.mask = "),
        ("Attention(mask=Causal() & Dense())", "'Causal() & Dense()': must be calls such as"),
        ("Attention(mask=3 & 1)", "'3 & 1': must be calls such as"),
        ("Causal()", "must be layers, or all of them Repeat(...)"),
        ("MLP('tanh')", "MLP.activation = 'tanh': must be one of gelu"),
        ("MoD(Dense(), router='best')", "MoD.router = 'best': must be of type Router"),
        ("MoD(Dense(), rule=Linear())", "must be of type Rule"),
        ("MoD(Dense(), rule=Best())", "model.layers = 'Best': unknown; known: "),
        (
            "MoD(Dense(), router=Received())",
            "needs an earlier layer of its segment that passes on received",
        ),
    ],
)
def test_layers_that_cannot_be_are_refused_in_one_line(text, says):
    with pytest.raises(InputError) as caught:
        model(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_open_segment_takes_what_the_depth_leaves():
    text = "Repeat(Dense(), times=1), Repeat(Dense(), MoD(Dense())), Repeat(Dense(), times=1)"
    assert [s.times for s in model(text).segments] == [1, 2, 1]
    assert [s.times for s in model(text, num_layers=12).segments] == [1, 5, 1]
    assert model(text).routed() == 2


def test_the_canonical_form_leaves_defaults_out():
    """A field that is added with a default renames no run."""

    @dataclasses.dataclass(frozen=True)
    class Longer(TrainConfig):
        added: float = 0.5

    train = TrainConfig(8, 16, 10, 1e-3, 1, b2=0.95)
    assert canonical(train) == {
        "batch_size": 8,
        "seq_len": 16,
        "steps": 10,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "b2": 0.95,
    }
    assert canonical(Longer(8, 16, 10, 1e-3, 1, b2=0.95)) == canonical(train)
    assert "added" in canonical(Longer(8, 16, 10, 1e-3, 1, added=0.25))


def test_a_head_may_be_wider_than_its_share_and_norms_stand_where_they_are_put():
    plain = parameters(model((Dense(),)))
    wide = parameters(model((Dense(),), head_dim=12))
    assert wide["qkv"] == plain["qkv"] * 12 // 8 and wide["output"] == plain["output"] * 12 // 8
    both = model((Seq(Attention(norm="both"), MLP(norm="after")),))
    assert parameters(both)["norm"] == 6 * 3 * 16 + 16
    with pytest.raises(InputError, match=r"model\.head_dim = 7: must be even"):
        model((Dense(),), head_dim=7)


def test_nested_capacities_multiply_in_what_a_token_uses():
    inner = MoD(Dense(), capacity=0.5)
    found = parameters(model((MoD(inner, capacity=0.5),)))
    block = parameters(model((Dense(),)))["non_embedding"] - 16
    # The inner router is seen by half of the tokens, the outer one by all.
    assert found["active"] == round(block / 4 + 6 * 16 / 2 + 6 * 16 + 16)


LOOKING = Attention(rope=Rope(5.0), received=True)


@dataclasses.dataclass(frozen=True)
class Looking(Router):
    """Router from outside that contains attention."""

    inner: Layer = LOOKING


@pytest.mark.parametrize(
    "layer, ropes, numbers",
    [
        (MoD(router=Looking()), {Rope(5.0), Rope()}, 640),
        (MoE(4, router=Looking()), {Rope(5.0)}, 320),
    ],
)
def test_what_a_router_contains_belongs_to_the_layer_around_it(layer, ropes, numbers):
    shape = model("Dense()").shape
    assert layer.ropes() == ropes
    assert layer.cache_numbers(shape, 10, None) == numbers  # 2 * 2 heads * 8 * 10, each attention
    assert layer.passes_on() == frozenset(), "only the scores leave a router"
    with pytest.raises(InputError, match=r"model\.head_dim = 7: must be even"):
        layer.check(shape._replace(head_dim=7))


def test_experts_work_on_one_stream_though_they_contain_a_router():
    with pytest.raises(InputError, match=r"'MoE\(experts=4\)': works on one residual stream"):
        model("MoE(4)", streams="Recycled(2)")


def test_segments_are_values_too():
    assert Repeat(Dense(), times=2) == Repeat(Dense(), times=2) != Repeat(Dense(), times=3)
    assert len({Dense(), Seq(Attention(), MLP()), Dense("swiglu")}) == 2


@pytest.mark.parametrize(
    "mask, routings",
    [
        ("Causal()", ("trained", "causal")),
        ("Window(4) & Causal()", ("trained", "causal")),
        ("Window(4)", ("trained",)),
        ("Bidirectional()", ("trained",)),
        ("Prefix(4)", ("trained",)),
    ],
)
def test_a_mask_that_looks_ahead_is_never_read_as_one_that_does_not(mask, routings):
    assert model(f"Seq(Attention(mask={mask}), MLP())").routings == routings
