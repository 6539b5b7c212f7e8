"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import best, cases, causal, loss, of_both_texts
from experiments.tables import best_table, pair_table
from modjax.records import RunRecord

HERE = Path(__file__).parent
TRAINED = of_both_texts(HERE)
TEXTS = {text: causal(records) for text, records in TRAINED.items()}
# Each scheme and learned routing of its capacity.
PAIRS = (
    "random50 - mod50",
    *(f"{scheme}12 - mod12" for scheme in (
        "random", "positional", "learned-position", "token-choice", "attention", "threshold"
    )),
)  # fmt: skip
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
    arms = {text: next(iter(compare.cells(records).values())) for text, records in TEXTS.items()}
    for text, by_arm in arms.items():
        dense = loss(best(by_arm["dense"]))
        gain = 100 * (1 - min(loss(best(sizes)) for sizes in by_arm.values()) / dense)
        yield f"{gain:.1f}% below dense on {text}", 0 <= gain < 1
    apart = [
        abs(a.eval_loss - b.eval_loss)
        for by_arm in arms.values() for sizes in by_arm.values() for a, b in sizes
    ]  # fmt: skip
    yield f"The two seeds of a cell differ by {statistics.median(apart):.3f} in the median", True

    at = {arms: cases(TEXTS, arms) for arms in PAIRS}
    half = at["random50 - mod50"]
    yield f"random50 less mod50 is {half}", half.above and half.told == 2
    yield f"{min(d.mean / d.error for d in half.all):.1f} standard errors or more", True
    eighth = at["random12 - mod12"]
    yield f"random12 less mod12 is {eighth}, on English", eighth.above and eighth["English"][0].told
    fixed = at["positional12 - mod12"]
    yield f"A fixed pattern (every eighth token) is level with it, {fixed}", fixed.told == 0
    for arm in ("learned-position", "threshold", "attention"):
        found = at[f"{arm}12 - mod12"]
        yield f"{arm}12 {found}", found.told == 1 and found["English"][0].low > 0
    found = at["token-choice12 - mod12"]
    yield f"token-choice12 {found}", found.told == 0

    every = [loss(runs) for text in TRAINED for runs in trained_arm(text, "mod12-every")]
    yield f"{min(every):.2f} to {max(every):.2f} as trained", min(every) > 2.4
    others = [
        abs(r.causal_difference)
        for records in TEXTS.values()
        for r in records
        if r.causal_difference is not None and r.variant not in ("attention12", "mod12-every")
    ]
    yield f"by {max(others):.3f} at most in any of the other runs", max(others) < 0.01
    for arm in ("attention12", "mod12-every"):
        changes = [
            statistics.mean(r.causal_difference or 0 for r in records if r.variant == arm)
            for records in TEXTS.values()
        ]
        yield f"{arm} by {changes[0]:+.3f} on source code and {changes[1]:+.3f} on English", True
    said = [
        r.outcome.get("causal/accuracy") or 0
        for of in TEXTS.values()
        for r in of
        if r.variant == "attention12"
    ]
    yield f"accuracy {min(said):.0%} to {max(said):.0%}", max(said) < 0.9


def trained_arm(text: str, arm: str) -> list[list[RunRecord]]:
    (by_arm,) = compare.cells(TRAINED[text]).values()
    return by_arm[arm]


# Of the plan, the paper, and of timed steps, which are not kept.
GIVEN = (
    "with 12.5% or 50% of the positions",
    "the paper reports 60 to 66% at equal size",
    "30% faster than a dense one of 49k",
    "other routers of 12.5% at 63k 120 to 130",
    "*every* block at 12.5%",
    'where "no" is 87.5%',
    "The paper compares at 50% only",
)
