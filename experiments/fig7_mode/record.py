"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import cases, causal, of_both_texts, own, rates
from experiments.tables import best_table, optimum_table, pair_table, rate_table
from modjax.records import read_csv

HERE = Path(__file__).parent
TRAINED = of_both_texts(HERE)
TEXTS = {text: causal(records) for text, records in TRAINED.items()}
RATES = causal(read_csv(HERE / "rates.csv"))
CONTROLS = ("integrated - reduced", "integrated - random", "random - reduced")
OPTIMA = {
    text: compare.optima(records, "dense", "moe", "reduced") for text, records in TEXTS.items()
}


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


COLUMNS = {
    "total": lambda r: f"{r.params_total / 1e3:.0f}k",
    "active": lambda r: f"{r.params_active / 1e3:.0f}k",
    "dropped": lambda r: share(r.outcome.get("trained/moe/dropped")),
    "no-op": lambda r: share(r.outcome.get("trained/moe/no_op")),
    "useful": lambda r: share(r.outcome.get("trained/moe/useful")),
}
OWN = ("integrated - reduced", "staged - moe", "integrated - moe", "moe - dense", "staged - dense",
       "integrated - dense", "mod12 - dense")  # fmt: skip


def tables() -> dict[str, str]:
    return {
        "best-stdlib": best_table(TRAINED["source code"], COLUMNS),
        "best-english": best_table(TRAINED["English"], COLUMNS),
        "rates": rate_table(RATES),
        "pairs": pair_table(TEXTS, CONTROLS),
        "pairs-trained": pair_table(TRAINED, CONTROLS),
        "optima": optimum_table(
            {t: {key: of[key] for key in of if key[1] in OWN} for t, of in OPTIMA.items()}
        ),
    }


def claims() -> Iterator[tuple[str, bool]]:
    dropped, chance, controls = (cases(TEXTS, arms) for arms in CONTROLS)
    yield f"Integrated less reduced is {dropped}", dropped.below
    errors = ", ".join(f"{abs(d.mean / d.error):.1f}" for d in dropped.all)
    yield f"These are {errors} standard errors", True
    yield f"Integrated less random is {chance}", chance.below and chance.told == 4
    yield f"Random less reduced is {controls}", controls.above and controls.told == 4
    trained = cases(TRAINED, "random - reduced")
    yield f"As trained the two are nearly alike, {trained}", trained.above and trained.told == 1
    as_trained = cases(TRAINED, "integrated - reduced")
    yield (
        "by more in every case than without drops",
        all(a.mean < d.mean for a, d in zip(as_trained.all, dropped.all, strict=True)),
    )
    passing = own(OPTIMA, "integrated - reduced")
    yield f"Integrated is against reduced here {passing.tally}", passing.below and passing.told == 2
    staged = own(OPTIMA, "staged - moe")
    yield f"its loss less that of moe is {staged}", staged.below and staged.told == 3
    integrated = own(OPTIMA, "integrated - moe")
    yield f"Integrated is {integrated.tally}", integrated.told == 1
    moe = own(OPTIMA, "moe - dense")
    yield f"moe is against dense {moe.tally}", moe.told == 1
    staged = own(OPTIMA, "staged - dense")
    yield f"Staged is against dense {staged.tally}", staged.below and staged.told == 2
    for arm in ("moe", "staged", "integrated", "reduced"):
        gains = [
            -statistics.mean(r.causal_difference or 0 for r in records
                             if (r.variant, r.budget_flops) == (arm, budget))
            for records in TEXTS.values() for budget in compare.cells(records)
        ]  # fmt: skip
        yield f"{min(gains):.3f} to {max(gains):.3f} for {arm}", min(gains) > 0
    apart = [
        abs(a.eval_loss - b.eval_loss)
        for records in TEXTS.values()
        for by_arm in compare.cells(records).values()
        for sizes in by_arm.values()
        for a, b in sizes
    ]
    yield f"Two seeds of a cell differ by {statistics.median(apart):.3f} in the median", True
    means = {
        arm: {x: statistics.mean(of) for x, of in by.items()} for arm, by in rates(RATES).items()
    }
    behind = {arm: by[0.2] - min(by.values()) for arm, by in means.items()}
    yield (
        f"The shared rate, 0.2, is the best of the three for integrated, and worse than 0.1 by "
        f"{behind['dense']:.3f} for dense and {behind['moe']:.3f} for moe",
        {arm: min(by, key=by.__getitem__) for arm, by in means.items()}
        == {"dense": 0.1, "moe": 0.1, "integrated": 0.2},
    )
    halved = [abs(by[0.1][seed] - by[0.2][seed]) for by in rates(RATES).values() for seed in (0, 1)]
    yield f"single runs at the two rates differ by {min(halved):.3f} to {max(halved):.3f}", True
    again = [
        (kept.variant, kept.eval_loss, r.eval_loss)
        for r in read_csv(HERE / "rates.csv")
        for kept in TRAINED["source code"]
        if r.variant == f"{kept.variant}-lr0_2"
        and (r.budget_flops, r.d_model, r.seed) == (kept.budget_flops, kept.d_model, kept.seed)
    ]
    ((arm, one_core, two_cores),) = [run for run in again if run[1] != run[2]]
    yield (
        f"{len(again) - 1} of the {len(again)} runs at 0.2, which the sweep has, too, are equal to "
        f"the last bit; one of {arm} ended at {one_core:.3f} there and at {two_cores:.3f} here, "
        "as trained",
        len(again) == 6,
    )


GIVEN = ("by 1.3 to 2.1%",)
