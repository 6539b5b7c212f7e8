"""The planner against its stated rules, computed here by hand, for every sweep of configs/."""

import math
from pathlib import Path

import pytest

from modjax.scaling.plan.experiment import load
from modjax.scaling.plan.plan_table import cells
from modjax.specs import Dense, MoD, Random

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = str(CONFIGS / "tiny.py")
NO_SWEEP = {"base.py", "single.py", "fig5_routing.py", "expert_use.py", "pretrained.py"}
NO_SWEEP |= {"router_tuning.py"}
SWEEPS = [
    *sorted({path.name for path in CONFIGS.glob("*.py")} - NO_SWEEP),
    *("altup.py:rates", "altup.py:vocabulary", "fig7_mode.py:rates"),
    *("paper.py:6e18", "paper.py:2e19", "paper.py:1e20"),
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
        "dense": (90e6, 3.3e9),
        "mod12": (134e6, 5.6e9),
        "mod50": (134e6, 4.4e9),
        "random50": (134e6, 4.4e9),
        "moe": (189e6, 8.2e9),
        "integrated": (189e6, 12.7e9),
        "staged": (305e6, 14.6e9),
    }
    assert stated.keys() == experiment.sweep.arms.keys()
    for arm, (smallest, largest) in stated.items():
        sizes = [c.params_total for c in table(experiment) if c.arm == arm]
        assert min(sizes) == pytest.approx(smallest, rel=0.02)
        assert max(sizes) == pytest.approx(largest, rel=0.02)


def test_the_baseline_grid_is_centred_on_the_predicted_optimum():
    experiment = load(TINY)
    optimum = experiment.sweep.optimum
    for budget in experiment.sweep.budgets:
        chosen = [c for c in table(experiment) if (c.arm, c.budget_flops) == ("dense", budget)]
        sizes = [cell.params_non_embedding for cell in chosen]
        predicted = optimum.params * (budget / optimum.budget) ** optimum.exponent
        centre = sum(map(math.log10, sizes)) / len(sizes)
        assert centre == pytest.approx(math.log10(predicted), abs=0.15)
        assert math.log10(max(sizes) / min(sizes)) <= 2 * experiment.sweep.spread + 0.3


def test_other_arms_match_the_baselines_forward_flops():
    rows = table(load(str(CONFIGS / "paper.py:6e18")))

    def forward(arm):
        return sorted(row.forward_flops_per_token for row in rows if row.arm == arm)

    for arm in ("mod12", "mod50"):
        for mine, baseline in zip(forward(arm), forward("dense"), strict=True):
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
    recipe = {"batch_exponent": 0.5, "learning_rate": 0.3, "batch_size": 8, "warmup_fraction": 0.1}
    overrides = [f"sweep.recipe.{field}={value}" for field, value in recipe.items()]
    overrides += ["sweep.optimum.budget=5e11", "sweep.budgets=5e11,8e12"]
    for spec in load(TINY, overrides).specs:
        batch = {5e11: 8, 8e12: 32}[spec.budget_flops]
        assert spec.train.batch_size == batch
        assert spec.train.learning_rate == pytest.approx(0.3 * batch**0.5 / spec.model.d_model)
        assert spec.train.warmup_steps == round(0.1 * spec.train.steps)


def test_shapes_follow_from_the_width():
    shape = {"width_multiple": 32, "head_dim": 16, "aspect": 16.0, "layer_multiple": 2}
    overrides = [f"sweep.shape.{field}={value}" for field, value in shape.items()]
    overrides.append("sweep.shape.ff_multiple=3.0")
    for spec in load(TINY, overrides).specs:
        model = spec.model
        assert model.d_model % 32 == 0
        assert model.num_heads == model.d_model // 16
        assert model.d_ff == 3 * model.d_model
        assert model.num_layers == max(2, 2 * (model.d_model // 32))


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


def test_a_run_of_many_steps_is_planned_at_once():
    overrides = ["sweep.budgets=5e15", "sweep.optimum.exponent=0.0"]
    cell = max(table(load(TINY, overrides)), key=lambda cell: cell.steps)
    assert cell.steps > 1e7 and cell.achieved == pytest.approx(1, abs=1e-6)
