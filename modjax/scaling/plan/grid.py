"""From a sweep (arms x budgets x sizes x seeds) to frozen RunSpecs; plan_table.py shows them.

The grid of the baseline arm is centred on its predicted compute-optimal size. Every
other arm gets the shapes whose forward FLOPs per token match the baseline's, size by size: the
sizing rule of Mixture-of-Depths (arXiv 2404.02258, figure 4: the optimal MoD is the one whose
forward FLOPs equal the optimal baseline's). So all arms see about the same number of tokens.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modjax.errors import InputError, is_bounded, require
from modjax.flops import forward_flops, parameters, total_flops, train_flops
from modjax.scaling.plan.config import (
    MOST_STEPS,
    RECIPE_FIELDS,
    SHAPE_FIELDS,
    WIDEST,
    Recipe,
    SweepConfig,
)
from modjax.specs import DataConfig, ModelSpec, Repeat, RunSpec, TrainConfig, from_dict
from modjax.specs.imports import without_unused
from modjax.specs.model import ENDS, read_end, read_layers

# What an arm can say beside the model fields in which it differs.
ARM_FIELDS = ("recipe", "forward_ratio")


def plan(
    sweep: SweepConfig, model: Mapping[str, Any], train: Mapping[str, Any], data: DataConfig
) -> list[RunSpec]:
    """The runs of a sweep, in the order they are best run: largest budget first.

    model, train: the fields that all runs share; the rest comes from the sweep's rules. The long
    runs go first because the short ones then fill the gaps, and all workers end together.
    Raises InputError for an unknown field, a shape that a pattern cannot use, or a budget that
    is too small for one step.
    """
    _require_absent("model", model, SHAPE_FIELDS, "sweep.shape")
    _require_absent("train", train, RECIPE_FIELDS, "sweep.recipe and sweep.seeds")
    _check_base(sweep, model)
    seq_len = train.get("seq_len")
    if not isinstance(seq_len, int) or seq_len <= 0 or not is_bounded(seq_len):
        raise InputError("train.seq_len", seq_len, "must be a positive number of tokens")
    arms = {name: _arm(sweep, model, name) for name in sweep.arms}
    recipes = {name: _recipe(sweep, name) for name in sweep.arms}
    baseline = sweep.baseline
    specs = []
    for budget in sorted(sweep.budgets, reverse=True):
        targets = _targets(sweep, budget)
        widths = _nearest_widths(sweep, arms[baseline], non_embedding, targets, budget)
        grid = {baseline: widths}
        forward = [forward_per_token(arms[baseline](width), seq_len) for width in widths]
        for arm in arms.keys() - {baseline}:
            ratio = forward_ratio(sweep, arm)
            grid[arm] = _nearest_widths(
                sweep,
                arms[arm],
                lambda built: forward_per_token(built, seq_len),
                [ratio * flops for flops in forward],
                budget,
            )
        for size in reversed(range(sweep.sizes)):
            for arm, build in arms.items():
                built = build(grid[arm][size])
                ratio = budget / sweep.optimum.budget
                specs += [
                    _spec(recipes[arm], ratio, arm, budget, built, train, data, seed)
                    for seed in sweep.seeds
                ]
    return specs


def _require_absent(group: str, values: Mapping, names: Sequence[str], rule: str) -> None:
    for name in names:
        require(
            name not in values,
            f"{group}.{name}",
            values.get(name),
            f"is decided by {rule} in a sweep: leave it out",
        )


def _check_base(sweep: SweepConfig, model: Mapping[str, Any]) -> None:
    """Raises InputError for a wrong field of the shared model, even where every arm changes it."""
    read_layers(model.get("layers", "Dense()"))
    for name in ENDS.keys() & model.keys():
        read_end(name, model[name])
    # Layers and streams have to fit each other in the arms only; a base may leave the rest to them.
    plain = {"vocab_size": 1, **model, "layers": "MLP()", "streams": None}
    from_dict(ModelSpec, plain | sweep.shape.at(sweep.shape.width_multiple), "model.")


def _arm(sweep: SweepConfig, model: Mapping[str, Any], arm: str) -> Callable[[int], ModelSpec]:
    """Returns a function of the width that makes the arm's model."""
    changes = sweep.arms[arm]
    known = [f.name for f in dataclasses.fields(ModelSpec) if f.name not in SHAPE_FIELDS]
    require(isinstance(changes, Mapping), f"sweep.arms.{arm}", changes, "must be a group of fields")
    changes = {name: value for name, value in changes.items() if name not in ARM_FIELDS}
    for name, value in changes.items():
        require(
            name in known,
            f"sweep.arms.{arm}.{name}",
            value,
            f"unknown; an arm can change {', '.join((*ARM_FIELDS, *known))}",
        )
    merged = {**model, **changes}
    field = f"sweep.arms.{arm}.layers" if "layers" in changes else "model.layers"
    layers = read_layers(merged.get("layers", "Dense()"), field)
    merged["layers"] = layers
    length = 1 if isinstance(layers[0], Repeat) else len(layers)
    require(
        sweep.shape.layer_multiple % length == 0,
        "sweep.shape.layer_multiple",
        sweep.shape.layer_multiple,
        f"must be a multiple of arm {arm}'s pattern length, {length}",
    )

    def build(width: int) -> ModelSpec:
        try:
            return from_dict(ModelSpec, merged | sweep.shape.at(width), "model.")
        except InputError as error:
            name, where = error.field.removeprefix("model."), f"sweep.arms.{arm}"
            if name in model and name not in changes:
                raise
            field = f"{where}.{name}" if name in changes else f"{where}: {error.field}"
            raise InputError(field, error.value, error.accepted) from error

    return build


def forward_ratio(sweep: SweepConfig, arm: str) -> float:
    """Forward FLOPs per token at the centre of the arm's grid over the baseline's."""
    ratio = sweep.arms[arm].get("forward_ratio", 1.0)
    field = f"sweep.arms.{arm}.forward_ratio"
    require(
        isinstance(ratio, int | float) and 1e-3 <= ratio <= 1e3,
        field,
        ratio,
        "must be a number from 0.001 to 1000",
    )
    return ratio


def _recipe(sweep: SweepConfig, arm: str) -> Recipe:
    changes = sweep.arms[arm].get("recipe", {})
    field = f"sweep.arms.{arm}.recipe"
    require(isinstance(changes, Mapping), field, changes, "must be a group of fields")
    merged = {**dataclasses.asdict(sweep.recipe), **changes}
    return from_dict(Recipe, merged, f"{field}.")


def non_embedding(model: ModelSpec) -> float:
    """N, the model's parameters without its embedding and output projection."""
    return parameters(model)["non_embedding"]


def forward_per_token(model: ModelSpec, seq_len: int) -> float:
    """Forward FLOPs per token, in the convention in which budgets are spent."""
    return total_flops(forward_flops(model, seq_len)) / seq_len


def _targets(sweep: SweepConfig, budget: float) -> list[float]:
    """Sizes evenly spaced in log N within the spread around N*(C)."""
    centre = sweep.optimum.at(budget)
    if sweep.sizes == 1:
        return [centre]
    steps = [2 * i / (sweep.sizes - 1) - 1 for i in range(sweep.sizes)]
    return [centre * 10 ** (sweep.spread * step) for step in steps]


def _nearest_widths(
    sweep: SweepConfig,
    build: Callable[[int], ModelSpec],
    measure: Callable[[ModelSpec], float],
    targets: Sequence[float],
    budget: float,
) -> list[int]:
    """For every target the width whose `measure` is nearest in log, each width at most once.

    `measure` grows with the width. Raises InputError where a target lies beyond the widest model.
    """
    multiple = sweep.shape.width_multiple
    steps = range(WIDEST // multiple + 1)  # a width is so many multiples

    @functools.cache
    def measured(step: int) -> float:
        return measure(build(step * multiple))

    def place(target: float) -> int:
        """The first step that reaches the target."""
        return bisect.bisect_left(steps, target, lo=1, key=measured)

    last = max(place(max(targets)), len(targets))
    require(
        last < len(steps),
        "sweep.budgets",
        budget,
        f"its grid has models wider than {WIDEST}: lower the budget, sweep.optimum.params or "
        "exponent, sweep.spread, or an arm's forward_ratio",
    )
    chosen: set[int] = set()
    for target in targets:
        above = place(target)
        below = above - 1
        while above in chosen:
            above += 1
        while below in chosen:
            below -= 1
        free = [step for step in (below, above) if 1 <= step <= last]
        chosen.add(min(free, key=lambda step: abs(math.log(measured(step) / target))))
    return [step * multiple for step in sorted(chosen)]


def _spec(
    recipe: Recipe,
    ratio: float,
    arm: str,
    budget: float,
    model: ModelSpec,
    train: Mapping[str, Any],
    data: DataConfig,
    seed: int,
) -> RunSpec:
    batch = recipe.batch_at(ratio)
    trained = train.get("trained", "all")
    per_step = train_flops(model, train["seq_len"], batch, trained=trained)
    steps = round(budget / per_step)
    if steps < 1:
        raise InputError(
            "sweep.budgets",
            budget,
            f"too small for a step of arm {arm} at d_model {model.d_model}, which takes "
            f"{per_step:.2g} FLOPs: raise the budget, or lower sweep.recipe.batch_size or "
            "sweep.optimum.params",
        )
    require(
        steps <= MOST_STEPS,
        "sweep.budgets",
        budget,
        f"too large: arm {arm} at d_model {model.d_model} takes {steps:.2g} steps of "
        f"{per_step:.2g} FLOPs; at most {MOST_STEPS:g} are planned",
    )
    decided = {
        "batch_size": batch,
        "steps": steps,
        "learning_rate": recipe.learning_rate * math.sqrt(batch) / model.d_model,
        "warmup_steps": round(recipe.warmup_fraction * steps),
        "seed": seed,
    }
    model = without_unused(model)
    return RunSpec(arm, budget, model, from_dict(TrainConfig, {**train, **decided}, "train."), data)
