"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import cases, causal, mean_rates, of_both_texts, own, rates
from experiments.tables import best_table, optimum_table, pair_table, rate_table
from modjax.records import read_csv

HERE = Path(__file__).parent
TRAINED = of_both_texts(HERE)
TEXTS = {text: causal(records) for text, records in TRAINED.items()}
RATES = read_csv(HERE / "rates.csv")
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
OWN = (
    "integrated - reduced, staged - moe, integrated - moe, moe - dense, staged - dense, "
    "integrated - dense, mod12 - dense"
).split(", ")


def tables() -> dict[str, str]:
    return {
        "best-stdlib": best_table(TRAINED["source code"], COLUMNS),
        "best-english": best_table(TRAINED["English"], COLUMNS),
        "rates": rate_table(causal(RATES)),
        "pairs": pair_table(TEXTS, CONTROLS),
        "pairs-trained": pair_table(TRAINED, CONTROLS),
        "optima": optimum_table(
            {t: {key: of[key] for key in of if key[1] in OWN} for t, of in OPTIMA.items()}
        ),
    }


def claims() -> Iterator[tuple[str, bool]]:
    yield from result()
    yield from controls()
    yield from own_optima()
    yield from drops()
    yield from learning_rates()


def result() -> Iterator[tuple[str, bool]]:
    staged, chosen = own(OPTIMA, "staged - moe"), cases(TEXTS, "integrated - reduced")
    yield (
        f"staged MoDE is significantly better than experts alone in {staged.significant} of 4",
        staged.below,
    )
    yield (
        f"integrated MoDE is significantly better than dropping in {chosen.significant} of 4",
        chosen.below,
    )


def controls() -> Iterator[tuple[str, bool]]:
    dropped, chance, random = (cases(TEXTS, arms) for arms in CONTROLS)
    yield f"integrated minus reduced is {dropped}", dropped.below
    errors = ", ".join(f"{abs(d.mean / d.error):.1f}" for d in dropped.all)
    yield f"These are {errors} standard errors", True
    yield f"integrated minus random is {chance}", chance.below and chance.significant == 4
    yield f"random minus reduced is {random}", random.above and random.significant == 4
    trained = cases(TRAINED, "random - reduced")
    yield f"As trained, the difference is {trained}", trained.above and trained.significant == 1
    as_trained = cases(TRAINED, "integrated - reduced")
    yield (
        "As trained, integrated is ahead by more in every case",
        all(a.mean < d.mean for a, d in zip(as_trained.all, dropped.all, strict=True)),
    )


def own_optima() -> Iterator[tuple[str, bool]]:
    staged = own(OPTIMA, "staged - moe")
    yield f"staged minus moe is {staged}", staged.below and staged.significant == 3
    integrated = own(OPTIMA, "integrated - moe")
    yield (
        f"Compared with moe, integrated is {integrated.tally}, at 1e11 FLOPs on source code",
        integrated.significant == 1 and integrated["source code"][0].high < 0,
    )
    moe = own(OPTIMA, "moe - dense")
    yield (
        f"Compared with dense, moe is {moe.tally}, at 1e11 FLOPs on source code",
        moe.significant == 1 and moe["source code"][0].low > 0,
    )
    for arm, baseline in (("staged", "dense"), ("integrated", "reduced")):
        found = own(OPTIMA, f"{arm} - {baseline}")
        yield (
            f"Compared with {baseline}, {arm} is {found.tally}, both on English",
            found.below and [d.high < 0 for d in found.all] == [False, False, True, True],
        )


def drops() -> Iterator[tuple[str, bool]]:
    for arm in ("moe", "staged", "integrated", "reduced"):
        gains = []
        for records in TEXTS.values():
            for budget in compare.cells(records):
                runs = (r for r in records if (r.variant, r.budget_flops) == (arm, budget))
                gains.append(-statistics.mean(r.causal_difference or 0 for r in runs))
        yield f"{min(gains):.3f} to {max(gains):.3f} for {arm}", min(gains) > 0
    apart = compare.seed_difference(*TEXTS.values())
    yield f"Two seeds of a cell differ by {apart:.3f} in the median", True


def learning_rates() -> Iterator[tuple[str, bool]]:
    means = mean_rates(causal(RATES))
    worse = {arm: by_rate[0.2] - min(by_rate.values()) for arm, by_rate in means.items()}
    yield (
        "The shared rate, 0.2, is the best of the three for integrated. It is worse than 0.1 by "
        f"{worse['dense']:.3f} for dense and by {worse['moe']:.3f} for moe",
        {arm: min(by_rate, key=by_rate.__getitem__) for arm, by_rate in means.items()}
        == {"dense": 0.1, "moe": 0.1, "integrated": 0.2},
    )
    halved = [
        abs(by_rate[0.1][seed] - by_rate[0.2][seed])
        for by_rate in rates(causal(RATES)).values()
        for seed in (0, 1)
    ]
    yield f"Single runs at the two rates differ by {min(halved):.3f} to {max(halved):.3f}", True
    again = compare.trained_twice(TRAINED["source code"], RATES)
    ((arm, one_core, two_cores),) = [run for run in again if run[1] != run[2]]
    yield (
        f"The main sweep has the runs at 0.2 too: {len(again) - 1} of the {len(again)} are equal "
        f"to the last bit. One run of {arm} ended at {one_core:.3f} there and at {two_cores:.3f} "
        "here, as trained",
        len(again) == 6,
    )


GIVEN = ("by 1.3 to 2.1%",)
