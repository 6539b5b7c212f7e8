"""The runs of a sweep (arms x budgets x sizes x seeds); plan_table.py shows them.

The grid of the baseline is centred on its predicted compute-optimal size. Every other arm gets the
shapes whose forward FLOPs per token match the baseline's, size by size. This is the sizing rule of
Mixture-of-Depths (arXiv 2404.02258, figure 4): the forward FLOPs of the optimal MoD equal those of
the optimal baseline. So all arms see about the same number of tokens.
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

ARM_FIELDS = ("recipe", "forward_ratio")  # an arm's fields beside those of its model


def plan(
    sweep: SweepConfig, model: Mapping[str, Any], train: Mapping[str, Any], data: DataConfig
) -> list[RunSpec]:
    """Returns the runs of a sweep in the best order to run them: largest budget first.

    Short runs at the end fill the gaps, so that all workers end together.

    model, train: the fields that all runs share. The sweep's rules decide the rest.
    Raises InputError for an unknown field, a shape that an arm's pattern cannot use, or a budget
    that is too small for one step.
    """
    _require_absent("model", model, SHAPE_FIELDS, "sweep.shape")
    _require_absent("train", train, RECIPE_FIELDS, "sweep.recipe and sweep.seeds")
    _check_shared(sweep, model)
    seq_len = train.get("seq_len")
    if not isinstance(seq_len, int) or seq_len <= 0 or not is_bounded(seq_len):
        raise InputError("train.seq_len", seq_len, "must be a positive number of tokens")
    arms = {name: _arm(sweep, model, name) for name in sweep.arms}
    recipes = {name: _recipe(sweep, name) for name in sweep.arms}
    specs = []
    for budget in sorted(sweep.budgets, reverse=True):
        widths = _widths(sweep, arms, budget, seq_len)
        for size in reversed(range(sweep.sizes)):
            for arm, build in arms.items():
                built = build(widths[arm][size])
                decided = _decide(sweep, recipes[arm], arm, budget, built, train)
                built = without_unused(built)
                for seed in sweep.seeds:
                    trained = {**train, **decided, "seed": seed}
                    trained = from_dict(TrainConfig, trained, "train.")
                    specs.append(RunSpec(arm, budget, built, trained, data))
    return specs


def _widths(
    sweep: SweepConfig, arms: Mapping[str, Callable[[int], ModelSpec]], budget: float, seq_len: int
) -> dict[str, list[int]]:
    """Returns the widths of every arm at a budget, smallest first."""

    def forward(model: ModelSpec) -> float:
        return forward_per_token(model, seq_len)

    baseline = arms[sweep.baseline]
    sizes = _nearest_widths(sweep, baseline, non_embedding, _targets(sweep, budget), budget)
    widths = {sweep.baseline: sizes}
    flops = [forward(baseline(width)) for width in sizes]
    for arm in arms.keys() - {sweep.baseline}:
        ratio = forward_ratio(sweep, arm)
        targets = [ratio * target for target in flops]
        widths[arm] = _nearest_widths(sweep, arms[arm], forward, targets, budget)
    return widths


def _require_absent(group: str, values: Mapping, names: Sequence[str], rule: str) -> None:
    for name in names:
        accepted = f"is decided by {rule} in a sweep: leave it out"
        require(name not in values, f"{group}.{name}", values.get(name), accepted)


def _check_shared(sweep: SweepConfig, model: Mapping[str, Any]) -> None:
    """Raises InputError for a wrong field of the shared model, even if every arm replaces it."""
    read_layers(model.get("layers", "Dense()"))
    for name in ENDS.keys() & model.keys():
        read_end(name, model[name])
    # Layers and streams must fit each other in the arms only, which may also set the vocabulary.
    plain = {"vocab_size": 1, **model, "layers": "MLP()", "streams": None}
    from_dict(ModelSpec, plain | sweep.shape.at(sweep.shape.width_multiple), "model.")


def _arm(sweep: SweepConfig, model: Mapping[str, Any], arm: str) -> Callable[[int], ModelSpec]:
    """Returns the function that builds the arm's model of a given width."""
    changes = sweep.arms[arm]
    known = [f.name for f in dataclasses.fields(ModelSpec) if f.name not in SHAPE_FIELDS]
    require(isinstance(changes, Mapping), f"sweep.arms.{arm}", changes, "must be a group of fields")
    changes = {name: value for name, value in changes.items() if name not in ARM_FIELDS}
    accepted = f"unknown; an arm can change {', '.join((*ARM_FIELDS, *known))}"
    for name, value in changes.items():
        require(name in known, f"sweep.arms.{arm}.{name}", value, accepted)
    merged = {**model, **changes}
    field = f"sweep.arms.{arm}.layers" if "layers" in changes else "model.layers"
    layers = read_layers(merged.get("layers", "Dense()"), field)
    merged["layers"] = layers
    length = 1 if isinstance(layers[0], Repeat) else len(layers)
    multiple = sweep.shape.layer_multiple
    accepted = f"must be a multiple of arm {arm}'s pattern length, {length}"
    require(multiple % length == 0, "sweep.shape.layer_multiple", multiple, accepted)

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
    """Returns the forward FLOPs per token at the centre of the arm's grid, over the baseline's."""
    ratio, field = sweep.arms[arm].get("forward_ratio", 1.0), f"sweep.arms.{arm}.forward_ratio"
    usable = isinstance(ratio, int | float) and 1e-3 <= ratio <= 1e3
    require(usable, field, ratio, "must be a number from 0.001 to 1000")
    return ratio


def _recipe(sweep: SweepConfig, arm: str) -> Recipe:
    changes, field = sweep.arms[arm].get("recipe", {}), f"sweep.arms.{arm}.recipe"
    require(isinstance(changes, Mapping), field, changes, "must be a group of fields")
    return from_dict(Recipe, {**dataclasses.asdict(sweep.recipe), **changes}, f"{field}.")


def non_embedding(model: ModelSpec) -> int:
    """Returns N, the parameters without the embedding and the output projection."""
    return parameters(model)["non_embedding"]


def forward_per_token(model: ModelSpec, seq_len: int) -> float:
    """Returns the forward FLOPs per token, in the convention in which budgets are spent."""
    return total_flops(forward_flops(model, seq_len)) / seq_len


def _targets(sweep: SweepConfig, budget: float) -> list[float]:
    """Returns sizes evenly spaced in log N, within the spread around N*(budget)."""
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
    """Returns for every target the width whose `measure` is nearest in log, without repeats.

    measure: a quantity that grows with the width.
    Raises InputError for a target beyond the widest model.
    """
    multiple = sweep.shape.width_multiple
    steps = range(WIDEST // multiple + 1)  # widths in units of `multiple`

    @functools.cache
    def measured(step: int) -> float:
        return measure(build(step * multiple))

    def place(target: float) -> int:
        """Returns the first step that reaches the target."""
        return bisect.bisect_left(steps, target, lo=1, key=measured)

    last = max(place(max(targets)), len(targets))
    accepted = (
        f"its grid has models wider than {WIDEST}: lower the budget, sweep.optimum.params or "
        "exponent, sweep.spread, or an arm's forward_ratio"
    )
    require(last < len(steps), "sweep.budgets", budget, accepted)
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


def _decide(
    sweep: SweepConfig,
    recipe: Recipe,
    arm: str,
    budget: float,
    model: ModelSpec,
    train: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns RECIPE_FIELDS without the seed, with the number of steps that the budget pays for."""
    batch = recipe.batch_at(budget / sweep.optimum.budget)
    per_step = train_flops(model, train["seq_len"], batch, trained=train.get("trained", "all"))
    steps = round(budget / per_step)
    where = f"arm {arm} at d_model {model.d_model}"
    small = (
        f"too small for a step of {where}, which takes {per_step:.2g} FLOPs: raise the budget, or "
        "lower sweep.recipe.batch_size or sweep.optimum.params"
    )
    require(steps >= 1, "sweep.budgets", budget, small)
    large = (
        f"too large: {where} takes {steps:.2g} steps of {per_step:.2g} FLOPs; at most "
        f"{MOST_STEPS:g} are planned"
    )
    require(steps <= MOST_STEPS, "sweep.budgets", budget, large)
    return {
        "batch_size": batch,
        "steps": steps,
        "learning_rate": recipe.learning_rate * math.sqrt(batch) / model.d_model,
        "warmup_steps": round(recipe.warmup_fraction * steps),
    }
