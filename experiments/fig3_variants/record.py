"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import best, cases, causal, loss, of_both_texts, seed_difference
from experiments.tables import best_table, pair_table

HERE = Path(__file__).parent
TRAINED = of_both_texts(HERE)
TEXTS = {text: causal(records) for text, records in TRAINED.items()}
SCHEMES = "random positional learned-position token-choice attention threshold".split()
# Each scheme minus learned routing of the same capacity.
PAIRS = ("random50 - mod50", *(f"{scheme}12 - mod12" for scheme in SCHEMES))
COLUMNS = {
    "N": lambda r: f"{r.params_non_embedding / 1e3:.0f}k",
    "routing": lambda r: r.causal_routing or "",
}


def tables() -> dict[str, str]:
    return {
        "best-stdlib": best_table(TRAINED["source code"], COLUMNS),
        "best-english": best_table(TRAINED["English"], COLUMNS),
        "pairs": pair_table(TEXTS, PAIRS),
        "pairs-trained": pair_table(TRAINED, PAIRS),
    }


def claims() -> Iterator[tuple[str, bool]]:
    for text, records in TEXTS.items():
        (by_arm,) = compare.cells(records).values()  # the sweep has one budget
        lowest = min(loss(best(sizes)) for sizes in by_arm.values())
        gain = 100 * (1 - lowest / loss(best(by_arm["dense"])))
        yield f"{gain:.1f}% below dense on {text}", 0 <= gain < 1
    yield (
        f"The two seeds of a cell differ by {seed_difference(*TEXTS.values()):.3f} in the median",
        True,
    )
    yield from schemes()
    yield from every_block()
    yield from causal_changes()


def schemes() -> Iterator[tuple[str, bool]]:
    at = {arms: cases(TEXTS, arms) for arms in PAIRS}
    half = at["random50 - mod50"]
    yield f"random50 minus mod50 is {half}", half.above and half.significant == 2
    least = min(d.mean / d.error for d in half.all)
    yield f"at least {least:.1f} standard errors", True
    eighth = at["random12 - mod12"]
    yield (
        f"random12 minus mod12 is {eighth}",
        eighth.above and eighth.significant == 1 and eighth["English"][0].significant,
    )
    fixed = at["positional12 - mod12"]
    yield f"positional12 minus mod12 is {fixed}", fixed.significant == 0
    for arm in ("learned-position", "threshold", "attention"):
        found = at[f"{arm}12 - mod12"]
        yield (
            f"{arm}12 minus mod12 is {found}",
            found.significant == 1 and found["English"][0].low > 0,
        )
    found = at["token-choice12 - mod12"]
    yield f"token-choice12 minus mod12 is {found}", found.significant == 0


def every_block() -> Iterator[tuple[str, bool]]:
    losses = [
        loss(runs)
        for records in TRAINED.values()
        for by_arm in compare.cells(records).values()
        for runs in by_arm["mod12-every"]
    ]
    yield f"{min(losses):.2f} to {max(losses):.2f} as trained", min(losses) > 2.4


def causal_changes() -> Iterator[tuple[str, bool]]:
    changed = ("attention12", "mod12-every")
    runs = [r for records in TEXTS.values() for r in records]
    others = [
        abs(r.causal_difference)
        for r in runs
        if r.causal_difference is not None and r.variant not in changed
    ]
    yield f"at most {max(others):.3f} in all other runs", max(others) < 0.01
    for arm in changed:
        code, english = (
            statistics.mean(r.causal_difference or 0 for r in records if r.variant == arm)
            for records in TEXTS.values()
        )
        yield f"{arm} by {code:+.3f} on source code and {english:+.3f} on English", True
    accuracy = [r.outcome.get("causal/accuracy") or 0 for r in runs if r.variant == "attention12"]
    yield f"accuracy is {min(accuracy):.0%} to {max(accuracy):.0%}", max(accuracy) < 0.9


# From the plan, the paper, and timed steps, which are not kept.
GIVEN = (
    "with 12.5% or 50% of the positions",
    "the paper reports 60 to 66% at equal size",
    "30% faster than a dense one of 49k",
    "other routers with 12.5% at 63k 120 to 130",
    "every block at 12.5%",
    'always answering "no" is right at 87.5%',
    "The paper compares at 50% only",
)
