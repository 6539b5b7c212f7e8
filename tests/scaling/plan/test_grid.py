"""The planner against its stated rules, computed here by hand, and every config of the project."""

import dataclasses
import math
import signal
from pathlib import Path

import numpy as np
import pytest

from modjax.cli.tables import plan_text
from modjax.errors import InputError
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.plan.experiment import load
from modjax.scaling.plan.plan_table import cells
from modjax.scaling.plan.prediction import CURVATURE, NOISE, foretell
from modjax.specs import Dense, MoD, Random

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = str(CONFIGS / "tiny.py")
ALONE = {"single.py", "fig5_routing.py", "expert_use.py"}  # one run each
SWEEPS = [
    *sorted({path.name for path in CONFIGS.glob("*.py")} - ALONE),
    *("fig7_mode.py:rates", "paper.py:6e18", "paper.py:2e19", "paper.py:1e20"),
]


def dense_forward_flops_per_token(spec) -> float:
    """By hand: 2 FLOPs per multiply-add of every matrix product; d_ff = 4 d, all heads separate."""
    d, layers, length = spec.model.d_model, spec.model.num_layers, spec.train.seq_len
    return layers * (24 * d * d + 4 * length * d) + 2 * d * spec.model.vocab_size


def of(specs, arm, budget=None):
    return [s for s in specs if s.variant == arm and budget in (None, s.budget_flops)]


def table(experiment, epochs=None):
    return cells(experiment.specs, experiment.sweep, lambda spec: epochs, 1e10)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_config_plans_on_budget_and_on_centre(name):
    experiment = load(str(CONFIGS / name))
    assert len({spec.run_id for spec in experiment.specs}) == len(experiment.specs)
    for cell in table(experiment):
        assert abs(cell.achieved - 1) < 0.01
        assert cell.flags == ()


@pytest.mark.parametrize("name", SWEEPS)
def test_steps_spend_the_budget_by_a_hand_count(name):
    for spec in load(str(CONFIGS / name)).specs:
        if spec.model.layers != (Dense(),):
            continue
        spent = 3 * dense_forward_flops_per_token(spec) * spec.train.tokens
        assert spent == pytest.approx(spec.budget_flops, rel=0.01)


def test_the_demo_has_three_budgets_five_sizes_and_two_arms():
    experiment = load(TINY)
    budgets = {spec.budget_flops for spec in experiment.specs}
    assert len(budgets) >= 3
    for budget in budgets:
        for arm in experiment.sweep.arms:
            assert len({s.model.d_model for s in of(experiment.specs, arm, budget)}) >= 5
    assert len(experiment.sweep.arms) >= 2


def test_the_papers_grid_has_its_batch_length_and_sizes():
    experiment = load(str(CONFIGS / "paper.py"))
    assert {s.train.batch_size for s in experiment.specs} == {128}
    assert {s.train.seq_len for s in experiment.specs} == {2048}
    assert sorted({s.budget_flops for s in experiment.specs}) == [6e18, 2e19, 1e20]
    stated = {  # the total parameters that the config's docstring gives
        "dense": (90e6, 3.3e9), "mod12": (134e6, 5.6e9), "mod50": (134e6, 4.4e9),
        "random50": (134e6, 4.4e9), "moe": (189e6, 8.2e9), "integrated": (189e6, 12.7e9),
        "staged": (305e6, 14.6e9),
    }  # fmt: skip
    assert stated.keys() == experiment.sweep.arms.keys()
    for arm, (smallest, largest) in stated.items():
        sizes = [c.params_total for c in table(experiment) if c.arm == arm]
        assert min(sizes) == pytest.approx(smallest, rel=0.02)
        assert max(sizes) == pytest.approx(largest, rel=0.02)


def test_the_baseline_grid_is_centred_on_the_predicted_optimum():
    experiment = load(TINY)
    optimum = experiment.sweep.optimum
    for budget in experiment.sweep.budgets:
        sizes = [c.params_non_embedding for c in table(experiment)
                 if c.arm == "dense" and c.budget_flops == budget]  # fmt: skip
        predicted = optimum.params * (budget / optimum.budget) ** optimum.exponent
        centre = sum(map(math.log10, sizes)) / len(sizes)
        assert centre == pytest.approx(math.log10(predicted), abs=0.15)
        assert math.log10(max(sizes) / min(sizes)) <= 2 * experiment.sweep.spread + 0.3


def test_other_arms_match_the_baselines_forward_flops():
    rows = table(load(str(CONFIGS / "paper.py:6e18")))
    forward = {arm: sorted(r.forward_flops_per_token for r in rows if r.arm == arm)
               for arm in ("dense", "mod12", "mod50")}  # fmt: skip
    for arm in ("mod12", "mod50"):
        for mine, baseline in zip(forward[arm], forward["dense"], strict=True):
            assert mine == pytest.approx(baseline, rel=0.2)


def test_arms_of_one_size_rule_differ_only_in_what_the_config_says():
    # A predictor is paid for from the budget, in steps: without it the arms train alike.
    unpaid = ["sweep.arms.mod12.layers=Dense(), MoD(Dense(), capacity=0.125)"]
    specs = load(str(CONFIGS / "isoflop_cpu.py"), unpaid).specs
    for mod, control in zip(of(specs, "mod12"), of(specs, "random12"), strict=True):
        assert mod.train == control.train
        assert mod.model.d_model == control.model.d_model
        assert mod.model.layers == (Dense(), MoD(capacity=0.125))
        assert control.model.layers == (Dense(), MoD(capacity=0.125, rule=Random()))


def test_the_recipe_follows_its_rules_of_width_and_budget():
    overrides = ["sweep.recipe.batch_exponent=0.5", "sweep.recipe.learning_rate=0.3",
                 "sweep.recipe.batch_size=8", "sweep.optimum.budget=5e11",
                 "sweep.budgets=5e11,8e12", "sweep.recipe.warmup_fraction=0.1"]  # fmt: skip
    for spec in load(TINY, overrides).specs:
        batch = {5e11: 8, 8e12: 32}[spec.budget_flops]
        assert spec.train.batch_size == batch
        assert spec.train.learning_rate == pytest.approx(0.3 * batch**0.5 / spec.model.d_model)
        assert spec.train.warmup_steps == round(0.1 * spec.train.steps)


def test_shapes_follow_from_the_width():
    overrides = ["sweep.shape.width_multiple=32", "sweep.shape.head_dim=16",
                 "sweep.shape.aspect=16.0", "sweep.shape.layer_multiple=2",
                 "sweep.shape.ff_multiple=3.0"]  # fmt: skip
    for spec in load(TINY, overrides).specs:
        model = spec.model
        assert model.d_model % 32 == 0
        assert model.num_heads == model.d_model // 16
        assert model.d_ff == 3 * model.d_model
        assert model.num_layers == max(2, 2 * (model.d_model // 32))


@pytest.mark.parametrize("text", ["json,csv", "('json', 'csv')"])
def test_several_modules_to_import_are_given_by_commas(text):
    experiment = load(TINY, [f"model.imports={text}"])
    assert experiment.config["model"]["imports"] == ("json", "csv")
    assert list(experiment.imports) == ["json", "csv"]


def test_seeds_repeat_the_grid_with_the_same_data_order():
    specs = load(TINY, ["sweep.seeds=0,1,2"]).specs
    assert len(specs) == 3 * len(load(TINY).specs)
    assert {s.train.seed for s in specs} == {0, 1, 2}
    assert {s.data.seed for s in specs} == {0}


def test_the_longest_runs_come_first():
    budgets = [spec.budget_flops for spec in load(TINY).specs]
    assert budgets == sorted(budgets, reverse=True)


def test_a_run_keeps_its_name_when_only_the_execution_or_the_grid_around_it_changes():
    names = {spec.run_id for spec in load(TINY).specs}
    assert names == {s.run_id for s in load(TINY, ["execution.log_every=3"]).specs}
    assert names < {s.run_id for s in load(TINY, ["sweep.seeds=0,1"]).specs}
    assert not names & {s.run_id for s in load(TINY, ["train.b2=0.9"]).specs}


def test_cells_that_are_off_budget_off_centre_or_repeat_data_are_flagged():
    def flags(*overrides, epochs=None):
        return {flag for c in table(load(TINY, overrides), epochs) for flag in c.flags}

    assert flags("sweep.recipe.batch_size=64") == {"off-budget"}
    assert flags("sweep.optimum.params=3e2") == {"off-centre"}
    assert flags(epochs=0.9) == set()
    assert flags("data.max_epochs=2.0", epochs=1.5) == {"repeats data"}
    assert flags("data.max_epochs=1.0", epochs=1.5) == {"too many epochs"}
    assert flags("sweep.sizes=3") == {"can't tell"}
    assert flags("sweep.sizes=1") == set()  # such a grid seeks no optimum


def foretold(*overrides, noise=NOISE):
    experiment = load(TINY, overrides)
    rows = cells(experiment.specs, experiment.sweep, lambda spec: None, 1e10, noise)
    return {(c.arm, c.budget_flops): c.foretold for c in rows}


def test_four_sizes_and_one_seed_are_foretold_to_tell_little_and_a_second_seed_much():
    runs = [("dense", 1e12, n) for n in (10_000, 20_000, 40_000, 100_000)]
    (alone,) = foretell(runs).values()
    assert alone.freedom == 4 - 3 and not alone.tells
    twice = foretold("sweep.sizes=4", "sweep.seeds=0,1")
    assert all(f.tells and f.freedom == 2 * 4 for f in twice.values())
    assert sum(not f.tells for f in foretold("sweep.sizes=4").values()) >= 3
    assert {f.freedom for f in foretold("sweep.sizes=4").values()} == {2 * (4 - 3)}


def test_what_is_foretold_is_what_a_fit_of_such_runs_prints(make_sweep):
    """Runs whose scatter about their parabola is exactly the stated noise, fitted as records."""
    x = np.linspace(-0.5, 0.5, 6)
    design = np.vander(x, 3)
    noise = np.random.default_rng(1).standard_normal(6)
    noise -= design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    noise *= 0.02 * math.sqrt(3) / math.sqrt((noise**2).sum())
    records = make_sweep(arms=("dense",), budgets=(1e12,), sizes=6)
    records = [
        dataclasses.replace(r, eval_loss=2 + CURVATURE * u**2 + e, eval_loss_sem=0.0)
        for r, u, e in zip(records, x, noise, strict=True)
    ]
    fitted = fit_all(records, draws=4000).parabolas[0]
    runs = [("dense", r.budget_flops, r.params_non_embedding) for r in records]
    found = foretell(runs, 0.02)["dense", 1e12]
    assert (found.low, found.high, found.freedom) == (fitted.low, fitted.high, 3)
    np.testing.assert_allclose(np.log10(found.optimum_interval), np.log10(fitted.optimum_interval),
                               atol=0.02)  # fmt: skip
    assert foretell(runs, 0.2)["dense", 1e12].optimum_interval == (0, math.inf)


def test_the_plan_shows_what_can_be_told_for_every_arm_and_budget():
    experiment = load(TINY, ["sweep.sizes=4"])
    rows = cells(experiment.specs, experiment.sweep, lambda spec: None, 1e10, 0.03)
    text = plan_text(rows, 1)
    assert "noise of 0.03 nats" in text and "not determined" in text
    block = text[text.index("What `modjax fit`") :].splitlines()[2:8]
    assert [line.split()[:2] for line in block] == [
        [budget, arm] for budget in ("9e+11", "3e+11", "1e+11") for arm in ("dense", "mod12")
    ]
    with pytest.raises(InputError, match="must be greater than 0, in nats"):
        foretold(noise=0.0)


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
    "sweep.arms.mod12.layers=MoD(capacity=1.5)":
        "sweep.arms.mod12.layers = 'MoD(capacity=1.5)': MoD.capacity = 1.5: must be in (0, 1]",
    "sweep.arms.mod12.layers=MoD(capacity=0)":
        "sweep.arms.mod12.layers = 'MoD(capacity=0)': MoD.capacity = 0: must be in (0, 1]",
    "sweep.arms.mod12.layers=MoD(router='moe')":
        "sweep.arms.mod12.layers = \"MoD(router='moe')\": MoD.router = 'moe': must be of",
    "sweep.arms.mod12.layers=MoD(MoE(experts=4, topk=5))":
        "sweep.arms.mod12.layers = 'MoE(experts=4, topk=5)': MoE.topk = 5: unknown; known here: "
        "experts, rule, router, width",
    "sweep.arms.mod12.layers=AltUp(Dense())":
        "sweep.arms.mod12.layers = 'AltUp(Dense())': ",
    "sweep.arms.mod12.layers=Repeat(Dense(), times=7)":
        "sweep.arms.mod12: model.num_layers = ",
    "model.head_dim=x": "model.head_dim = 'x': must be of type int | None",
    "model.head_dim=3": "model.head_dim = 3: must be even",
    "sweep.shape.width_multiple=7": "sweep.shape.width_multiple = 7: must be even",
    "sweep.shape.layer_multiple=3": "sweep.shape.layer_multiple = 3: must be a multiple of arm",
    "sweep.budgets=1e3": "sweep.budgets = 1000.0: too small for a step of arm dense",
    "sweep.budgets=-1.0": "sweep.budgets = -1.0: must be greater than 0",
    "train.seq_len=0": "train.seq_len = 0: must be a positive number",
    "execution.remat=maybe": "execution.remat = 'maybe': must be one of none, dots, full",
}  # fmt: skip


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
    "sweep.recipe.batch_exponent=10.0;sweep.optimum.budget=1e2;sweep.optimum.exponent=0.0":
        "sweep.recipe.batch_exponent = 10.0: too large: the batch would have 2^",
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
}  # fmt: skip


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


def test_a_run_of_many_steps_is_planned_at_once():
    overrides = ["sweep.budgets=5e15", "sweep.optimum.exponent=0.0"]
    cell = max(table(load(TINY, overrides)), key=lambda cell: cell.steps)
    assert cell.steps > 1e7 and cell.achieved == pytest.approx(1, abs=1e-6)


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
    path = tmp_path / "arms.py"
    values = arms.partition("=")[2]
    more = f"""    values = config.to_dict()
    values["sweep"] |= {{"arms": {values}, "baseline": "a"}}
    return ml_collections.ConfigDict(values)"""
    path.write_text(Path(TINY).read_text().replace("    return config", more))
    with pytest.raises(InputError) as caught:
        load(str(path))
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
    arms = tmp_path / "arms.py"
    misspelt = Path(TINY).read_text().replace('"layers": "Dense(), MoD', '"mode": "Dense(), MoD')
    arms.write_text(misspelt)
    with pytest.raises(InputError, match=r"sweep.arms.mod12.mode = .*unknown; an arm can change"):
        load(str(arms))
    planned = tmp_path / "planned.py"
    planned.write_text(
        Path(TINY).read_text().replace('"seq_len": 128', '"seq_len": 128, "steps": 9')
    )
    with pytest.raises(InputError, match=r"train.steps = 9: is decided by sweep.recipe"):
        load(str(planned))


def test_a_config_without_a_sweep_is_one_run():
    experiment = load(str(CONFIGS / "single.py"), ["train.steps=70", "train.seed=3"])
    assert experiment.sweep is None
    (spec,) = experiment.specs
    assert (spec.train.steps, spec.train.seed, spec.variant) == (70, 3, "dense-mod")


def test_a_field_that_may_be_left_out_can_be_overridden():
    (spec,) = load(str(CONFIGS / "single.py"), ["model.head_dim=8"]).specs
    assert spec.model.head_dim == spec.model.shape.head_dim == 8
