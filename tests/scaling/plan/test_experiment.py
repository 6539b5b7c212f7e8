"""Config files and overrides, and one line of error for those that cannot be used."""

import dataclasses
import signal
import sys
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.scaling.plan import experiment as experiments
from modjax.scaling.plan.experiment import load

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = str(CONFIGS / "tiny.py")


def config(folder: Path, body: str) -> str:
    """Writes a config, whose get_config() has this body, and returns its path."""
    path = folder / "config.py"
    text = f"import ml_collections\nfrom base import sweep\n\ndef get_config():\n    {body}\n"
    path.write_text(text)
    return str(path)


BAD_LAYERS = {
    "MoD(capacity=1.5)": "'MoD(capacity=1.5)': MoD.capacity = 1.5: must be in (0, 1]",
    "MoD(capacity=0)": "'MoD(capacity=0)': MoD.capacity = 0: must be in (0, 1]",
    "MoD(router='moe')": "\"MoD(router='moe')\": MoD.router = 'moe': must be of",
    "MoD(MoE(experts=4, topk=5))": "'MoE(experts=4, topk=5)': MoE.topk = 5: unknown; "
    "known here: experts, rule, router, width",
    "AltUp(Dense())": "'AltUp(Dense())': ",
}
BAD = {
    "sweep.nonsense=1": "--config.sweep.nonsense = '1': unknown; known here: arms, baseline",
    "nonsense.a=1": "--config.nonsense.a = '1': unknown; known here: data, execution",
    "sweep.sizes.a=1": "--config.sweep.sizes.a = '1': is inside a plain value",
    "sweep.sizes=many": "--config.sweep.sizes = 'many': must be of type int, like 5",
    "sweep.sizes=0": "sweep.sizes = 0: must be greater than 0",
    "sweep.shape=3": "--config.sweep.shape = '3': is a group; set one of its fields: ",
    "train.steps=100": "--config.train.steps = '100': unknown",
    "model.d_model=64": "--config.model.d_model = '64': unknown",
    "model.layers=Dense('tanh')": "model.layers = \"Dense('tanh')\": MLP.activation = 'tanh': must",
    "model.streams=Dense()": "model.streams = 'Dense()': must be such as Recycled(2), or None",
    "model.dtype=float31": "model.dtype = 'float31': must be one of float32, bfloat16",
    "model.layers=Moe()": "model.layers = 'Moe': unknown; known: AltUp, Attention, Bidirectional",
    "sweep.arms.mod12.layers=Repeat(Dense(), times=7)": "sweep.arms.mod12: model.num_layers = ",
    "model.head_dim=x": "model.head_dim = 'x': must be of type int | None",
    "model.head_dim=3": "model.head_dim = 3: must be even",
    "sweep.shape.width_multiple=7": "sweep.shape.width_multiple = 7: must be even",
    "sweep.shape.layer_multiple=3": "sweep.shape.layer_multiple = 3: must be a multiple of arm",
    "sweep.budgets=1e3": "sweep.budgets = 1000.0: too small for a step of arm dense",
    "sweep.budgets=-1.0": "sweep.budgets = -1.0: must be greater than 0",
    "train.seq_len=0": "train.seq_len = 0: must be a positive number",
    "execution.remat=maybe": "execution.remat = 'maybe': must be auto, none, full, or names",
    **{
        f"sweep.arms.mod12.layers={layers}": f"sweep.arms.mod12.layers = {said}"
        for layers, said in BAD_LAYERS.items()
    },
}


LONG = "a" * 101
OUT_OF_SCALE = {
    "sweep.sizes=1000000000": "sweep.sizes = 1000000000: must be greater than 0 and at most 100",
    "sweep.spread=400.0": "sweep.spread = 400.0: must be greater than 0 and at most 5",
    "sweep.budgets=1e300": "sweep.budgets = 1e+300: must be finite, and",
    "sweep.budgets=1e90": "sweep.budgets = 1e+90: must be greater than 0 and at most 1e+40",
    "sweep.budgets=1e30": "sweep.budgets = 1e+30: its grid has models wider than 65536: lower",
    "sweep.budgets=1e-300": "sweep.budgets = 1e-300: too far from sweep.optimum.budget",
    "sweep.budgets=1e11,1e11": "sweep.budgets = (100000000000.0, 100000000000.0): must all differ",
    "sweep.optimum.params=1e300": "sweep.optimum.params = 1e+300: must be finite, and",
    "sweep.optimum.params=1e90": "sweep.optimum.params = 1e+90: must be greater than 0 and at",
    "sweep.optimum.params=1e18": "sweep.budgets = 900000000000.0: its grid has models wider than",
    "sweep.optimum.params=1e-300": "sweep.budgets = 900000000000.0: too far from",
    "sweep.optimum.budget=1e-300": "sweep.budgets = 900000000000.0: too far from",
    "sweep.optimum.budget=1e300": "sweep.optimum.budget = 1e+300: must be finite, and",
    "sweep.optimum.budget=1e90": "sweep.optimum.budget = 1e+90: must be greater than 0 and at",
    "sweep.optimum.exponent=1e6": "sweep.optimum.exponent = 1000000.0: must be in [-10, 10]",
    "sweep.optimum.exponent=-1e6": "sweep.optimum.exponent = -1000000.0: must be in [-10, 10]",
    "sweep.optimum.exponent=10.0;sweep.optimum.budget=1.0": "sweep.budgets = 900000000000.0: too f",
    "sweep.seeds=2147483648": "sweep.seeds = 2147483648: must be 0 or more and below 2**31",
    "sweep.seeds=-1": "sweep.seeds = -1: must be 0 or more and below 2**31",
    "sweep.seeds=0,0": "sweep.seeds = (0, 0): must all differ",
    "sweep.recipe.batch_size=1000000000000000000000": "sweep.recipe.batch_size = 100000000000",
    "sweep.recipe.batch_exponent=1e6": "sweep.recipe.batch_exponent = 1000000.0: must be in",
    "sweep.recipe.batch_exponent=10.0;sweep.optimum.budget=1e2;sweep.optimum.exponent=0.0": (
        "sweep.recipe.batch_exponent = 10.0: too large: the batch would have 2^"
    ),
    "sweep.recipe.learning_rate=1e300": "sweep.recipe.learning_rate = 1e+300: must be finite",
    "sweep.recipe.learning_rate=1e90": "sweep.recipe.learning_rate = 1e+90: must be greater",
    "sweep.shape.aspect=1e-300": "sweep.shape.aspect = 1e-300: must be at least 0.01",
    "sweep.shape.width_multiple=1000000000": "sweep.shape.width_multiple = 1000000000: must be gr",
    "sweep.shape.layer_multiple=1000000000": "sweep.shape.layer_multiple = 1000000000: must be gr",
    "sweep.shape.ff_multiple=1e300": "sweep.shape.ff_multiple = 1e+300: must be finite, and",
    "sweep.shape.ff_multiple=1e90": "sweep.shape.ff_multiple = 1e+90: must be greater than 0",
    "sweep.budgets=1e24;sweep.optimum.exponent=0.0": "sweep.budgets = 1e+24: too large: arm dense",
    "sweep.flops_per_second=1e-300": "sweep.flops_per_second = 1e-300: must be at least 1",
    "sweep.arms={'dense':{},'a b':{}}": "sweep.arms = 'a b': must be made of letters, digits, '-'",
    "sweep.arms={'dense':{},'" + LONG + "':{}}": f"sweep.arms = '{LONG}': names a folder: must be",
    "sweep.arms={'dense':{},'m':{'forward_ratio':1e300}}": "sweep.arms.m.forward_ratio = 1e+300: ",
    "sweep.arms={'dense':{},'m':{'forward_ratio':1e-300}}": "sweep.arms.m.forward_ratio = 1e-300",
    "sweep.arms={'dense':{},'m':{'recipe':{'batch_exponent':1e9}}}": "sweep.recipe.batch_exponent",
    "model.vocab_size=100000000000000000000000": "model.vocab_size = 100000000000000000000000: mus",
    "model.vocab_size=1000000000000000000": "sweep.budgets = 900000000000.0: too small for",
}


@pytest.mark.parametrize("overrides", OUT_OF_SCALE)
def test_a_number_out_of_scale_is_refused_in_one_line_and_at_once(overrides):
    def hangs(*_):
        raise TimeoutError(overrides)

    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)  # against a hang, not to measure
    try:
        with pytest.raises(InputError) as caught:
            load(TINY, overrides.split(";"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert str(caught.value).startswith(OUT_OF_SCALE[overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.document_mask=true", True),
        ("sweep.sizes=0x5", 5),
        ("sweep.spread=1", 1.0),
        ("data.name=3", "3"),
        ("sweep.seeds=7", (7,)),
        ("model.head_dim=8", 8),
        ("sweep.arms.mod12={}", {}),
    ],
)
def test_an_override_has_the_type_of_its_field(override, value):
    found = load(TINY, [override]).config
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["json,csv", "('json', 'csv')"])
def test_several_modules_to_import_are_given_by_commas(text):
    experiment = load(TINY, [f"model.imports={text}"])
    assert experiment.config["model"]["imports"] == ("json", "csv")
    assert list(experiment.imports) == ["json", "csv"]


def test_a_seed_or_name_that_no_run_can_have_is_refused():
    with pytest.raises(InputError, match=r"train.seed = 2147483648: must be below 2\*\*31"):
        load(str(CONFIGS / "single.py"), ["train.seed=2147483648"])
    spec = load(TINY).specs[0]
    with pytest.raises(InputError, match=f"variant = '{LONG}': names a folder: must be 1 to 100"):
        dataclasses.replace(spec, variant=LONG)


BAD_ARMS = {
    "sweep.arms={'a': {'recipe': 3}}": "sweep.arms.a.recipe = 3: must be a group of fields",
    "sweep.arms={'a': {'layers': 3}}": "sweep.arms.a.layers = '3': must be layers, or all of",
    "sweep.arms={'a': {'layers': 'mod'}}": "sweep.arms.a.layers = 'mod': must be calls such as",
    "sweep.arms={'a': {'layers': 'Moe()'}}": "sweep.arms.a.layers = 'Moe': unknown; known: Alt",
    "sweep.arms={'a': {'streams': 'Dense()'}}": "sweep.arms.a.streams = 'Dense()': must be such as",
    "sweep.arms={'a': {'head_dim': 3}}": "sweep.arms.a.head_dim = 3: must be even",
    "sweep.arms={'a': {'dtype': 'float31'}}": "sweep.arms.a.dtype = 'float31': must be one of",
    "sweep.arms={'a': 3}": "sweep.arms.a = 3: must be a group of fields",
    "sweep.arms=[1]": "sweep.arms = [1]: must be a group of arms",
}


@pytest.mark.parametrize("arms", BAD_ARMS)
def test_an_arm_of_the_wrong_type_is_one_line(arms, tmp_path):
    changes = f"""values = sweep({{"a": {{}}}}, (1e11,)).to_dict()
    values["sweep"] |= {{"arms": {arms.partition("=")[2]}}}
    return ml_collections.ConfigDict(values)"""
    with pytest.raises(InputError) as caught:
        load(config(tmp_path, changes))
    assert str(caught.value).startswith(BAD_ARMS[arms])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_line_that_names_field_value_and_remedy(override):
    # Bad layers of the model are refused although all arms set their own.
    with pytest.raises(InputError) as caught:
        load(TINY, [override])
    assert str(caught.value).startswith(BAD[override])
    assert "\n" not in str(caught.value)


def test_a_bad_config_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError: division by zero"):
        load(str(broken))
    with pytest.raises(InputError, match="the budget must be one of 6e18, 2e19, 1e20"):
        load(str(CONFIGS / "paper.py:7e18"))
    misspelt = config(tmp_path, 'return sweep({"dense": {}, "mod12": {"mode": 1}}, (1e11,))')
    with pytest.raises(InputError, match=r"sweep.arms.mod12.mode = 1: unknown; an arm can change"):
        load(misspelt)
    planned = (
        "values = sweep({'dense': {}}, (1e11,))\n    values.train.steps = 9\n    return values"
    )
    with pytest.raises(InputError, match=r"train.steps = 9: is decided by sweep.recipe"):
        load(config(tmp_path, planned))


def test_a_config_that_is_copied_alone_means_the_same_runs(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(Path(TINY).read_text())
    assert load(str(copy)).specs == load(TINY).specs
    assert "base" not in sys.modules


def test_the_base_beside_a_config_comes_first(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(Path(TINY).read_text())
    base = (CONFIGS / "base.py").read_text()
    (tmp_path / "base.py").write_text(base.replace('"seq_len": 128', '"seq_len": 64'))
    assert {spec.train.seq_len for spec in load(str(copy)).specs} == {64}
    assert {spec.train.seq_len for spec in load(TINY).specs} == {128}


def test_a_config_without_its_base_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CONFIGS", tmp_path / "none")
    copy = tmp_path / "mine.py"
    copy.write_text(Path(TINY).read_text())
    missing = f"No module named 'base'; copy base.py from modjax's configs/ to {tmp_path}$"
    with pytest.raises(InputError, match=missing) as caught:
        load(str(copy))
    assert "\n" not in str(caught.value)


def test_a_config_without_a_sweep_is_one_run():
    experiment = load(str(CONFIGS / "single.py"), ["train.steps=70", "train.seed=3"])
    assert experiment.sweep is None
    (spec,) = experiment.specs
    assert (spec.train.steps, spec.train.seed, spec.variant) == (70, 3, "dense-mod")


@pytest.mark.parametrize("times, variant", [(8, "dense-mod-" * 7 + "dense-mod"), (12, "dense-mod")])
def test_a_model_of_many_segments_has_a_name_that_a_folder_can_have(times, variant):
    segments = ", ".join(["Repeat(Dense(), times=1), Repeat(MoD(), times=1)"] * times)
    overrides = [f"model.layers={segments}", f"model.num_layers={2 * times}"]
    (spec,) = load(str(CONFIGS / "single.py"), overrides).specs
    assert spec.variant == variant


def test_a_field_that_may_be_left_out_can_be_overridden():
    (spec,) = load(str(CONFIGS / "single.py"), ["model.head_dim=8"]).specs
    assert spec.model.head_dim == spec.model.shape.head_dim == 8
