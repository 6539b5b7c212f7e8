"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import cases, causal, loss, mean_rates, of_both_texts, own
from experiments.tables import markdown, optimum_table, pair_table, rate_table
from modjax.records import RunRecord, read_csv
from modjax.scaling.formatting import budget as flops

HERE = Path(__file__).parent
TRAINED = of_both_texts(HERE)
TEXTS = {text: causal(records) for text, records in TRAINED.items()}
WORDS = causal(read_csv(HERE / "vocabulary.csv"))
RATES = read_csv(HERE / "rates.csv")
ALTUP = "recycled2 recycled4 full2 same2 sum2 simplified4".split()
HYPER_CONNECTIONS = "static2 dynamic2 manifold2".split()
PAIRS = (
    *(f"{arm} - dense" for arm in (*ALTUP, *HYPER_CONNECTIONS, "moe", "altup-moe")),
    *("recycled2 - same2", "full2 - sum2", "full2 - recycled2", "manifold2 - dynamic2"),
    *("seq4 - skip4", "seq4 - pool4", "seq4 - mod25", "skip4 - mod25"),
    *("altup-mod12 - mod12", "altup-moe - moe"),
)
# Negative if experts gain more from AltUp than dense layers do.
DOUBLE = "altup-moe - moe - recycled2 + dense"
OPTIMA = {text: compare.optima(records, "dense") for text, records in TEXTS.items()}
PAIR = {arms: cases(TEXTS, arms) for arms in (*PAIRS, DOUBLE)}
BEST = {arms: own(OPTIMA, arms) for _, arms in OPTIMA["English"]}
NARROW = 0.005  # nats
Claims = Iterator[tuple[str, bool]]


def about_the_best(records: list[RunRecord], sizes: int = 5) -> list[RunRecord]:
    """Returns the runs of the `sizes` sizes around each arm's best one."""
    kept: list[RunRecord] = []
    for by_arm in compare.cells(records).values():
        for cells in by_arm.values():
            cells = sorted(cells, key=lambda runs: runs[0].params_non_embedding)
            start = cells.index(compare.best(cells)) - sizes // 2
            start = max(0, min(start, len(cells) - sizes))
            kept += itertools.chain(*cells[start : start + sizes])
    return kept


WORD_OPTIMA = {
    "all sizes": compare.optima(WORDS, "dense"),
    "five sizes about the best": compare.optima(about_the_best(WORDS), "dense"),
}


def widths_table() -> str:
    rows = (
        (flops(budget), arm, ", ".join(f"{runs[0].d_model}: {loss(runs):.3f}" for runs in sizes))
        for budget, by_arm in compare.cells(WORDS).items()
        for arm, sizes in by_arm.items()
    )
    return markdown(("budget", "arm", "width: loss"), rows)


def tables() -> dict[str, str]:
    words = {"source code": WORDS}
    return {
        "pairs": pair_table(TEXTS, PAIRS),
        "double": pair_table(TEXTS, (DOUBLE,)),
        "optima": optimum_table(OPTIMA),
        "rates": rate_table(causal(RATES)),
        "vocabulary-widths": widths_table(),
        "vocabulary-pairs": pair_table(words, ("recycled2 - dense", "full2 - sum2")),
        "vocabulary-optima": optimum_table(WORD_OPTIMA),
    }


def claims() -> Claims:
    yield from result()
    yield from precision()
    yield from streams()
    yield from experts()
    yield from hyper_connections()
    yield from strides()
    yield from words()
    yield from learning_rates()


def result() -> Claims:
    lower = [arm for arm in ALTUP if any(d.high < 0 for d in BEST[f"{arm} - dense"].all)]
    yield "no form of AltUp on dense layers is significantly below dense", not lower
    found = PAIR["altup-moe - moe"]
    yield (
        f"experts with AltUp are significantly below experts alone in {found.significant} of 4",
        found.below,
    )


def precision() -> Claims:
    for arm in ("manifold2", "full2", "dynamic2", "moe"):
        ratios = [end - 1 for d in PAIR[f"{arm} - dense"].all for end in d.ratio]
        yield f"{100 * min(ratios):.0f} to {100 * max(ratios):.0f}% for {arm}", True
    every = [d for arms in PAIRS for d in PAIR[arms].all]
    chance, found = compare.CHANCE * len(every), sum(d.significant for d in every)
    varying = sum(d.varies for d in every)
    yield (
        f"{found} of the {len(every)} intervals exclude 0; chance alone would give about "
        f"{chance:.0f}",
        found > 3 * chance,
    )
    yield f"{varying} of the {len(every)} differences depend on the width", True
    needed = [(1.96 * d.error / NARROW) ** 2 * d.pairs for d in every]
    yield (
        f"An interval of {NARROW} nats on either side needs {min(needed):.0f} to "
        f"{max(needed):.0f} pairs, depending on arms and budget, and "
        f"{statistics.median(needed):.0f} in the median",
        True,
    )
    runs = [r for records in TEXTS.values() for r in records]
    sizes, read = [r.params_non_embedding for r in runs], [r.tokens for r in runs]
    yield (
        f"The models have {min(sizes) / 1e6:.3f} to {max(sizes) / 1e6:.2f} million non-embedding "
        f"parameters and read {min(read) / 1e6:.1f} to {max(read) / 1e6:.1f} million bytes",
        True,
    )


def streams() -> Claims:
    same, at_best = PAIR["same2 - dense"], BEST["same2 - dense"]
    yield f"At equal width, same2 minus dense is {same}", same.below and same.significant == 3
    yield f"At its own optimum, same2 is {at_best.tally}", at_best.significant == 0
    found = PAIR["recycled2 - same2"]
    yield (
        f"Compared with same2, recycled2 is {found.tally}, on English at the larger budget",
        found.significant == 1 and found["English"][1].low > 0,
    )
    for arm, holds in (("recycled2", PAIR["recycled2 - dense"].below), ("recycled4", True)):
        found = PAIR[f"{arm} - dense"]
        yield f"Compared with dense, {arm} is {found.tally}", found.significant == 0 and holds
    found = PAIR["full2 - sum2"]
    yield (
        f"Compared with sum2, full2 is {found.tally}",
        found["source code"][0].low > 0 and found["English"][1].high < 0,
    )


def experts() -> Claims:
    found = PAIR["altup-moe - moe"]
    yield f"altup-moe minus moe is {found}", found.below and found.significant == 3
    for text, differences in found.items():
        ends = differences[1].widths
        yield (
            f"{ends[12]:+.3f} at width 12 and {ends[36]:+.3f} at width 36 on {text}",
            differences[1].varies and ends[12] < 0 < ends[36],
        )
    found = PAIR[DOUBLE]
    yield f"The difference of the two gains is {found}", found.below and found.significant == 2
    found = PAIR["moe - dense"]
    yield (
        f"Compared with dense at equal width, moe is {found.tally}",
        found.above and found.significant == 4,
    )
    found = BEST["moe - dense"]
    yield (
        f"At its own optimum, moe is {found.tally}, on source code at the smaller budget",
        found.significant == 1 and found["source code"][0].low > 0,
    )
    for says, found in (
        ("At its own optimum, altup-moe is", BEST["altup-moe - dense"]),
        ("Compared with mod12 at equal width, altup-mod12 is", PAIR["altup-mod12 - mod12"]),
    ):
        yield (
            f"{says} {found.tally}, on English at the larger budget",
            found.significant == 1 and found["English"][1].high < 0,
        )


def hyper_connections() -> Claims:
    found = PAIR["static2 - dense"]
    yield (
        f"At equal width, static2 is {found.tally}, both on English",
        all(d.high < 0 for d in found["English"]),
    )
    found = BEST["static2 - dense"]
    yield f"At its own optimum, static2 is {found.tally}", found.significant == 0
    for arm in ("dynamic2", "manifold2", "simplified4"):
        equal, at_best = PAIR[f"{arm} - dense"], BEST[f"{arm} - dense"]
        yield (
            f"{arm} is {equal.tally} at equal width, and {at_best.tally} at its own optimum",
            equal.above and at_best.above,
        )
    found = PAIR["manifold2 - dynamic2"]
    yield (
        f"Compared with dynamic2, manifold2 is {found.tally}, both at the larger budget",
        found.significant == 2 and all(differences[1].low > 0 for differences in found.values()),
    )


def strides() -> Claims:
    found = PAIR["seq4 - skip4"]
    yield f"Compared with skip4, seq4 is {found.tally}", found.significant == 0
    for control in ("pool4", "mod25"):
        found = PAIR[f"seq4 - {control}"]
        yield (
            f"Compared with {control}, seq4 is {found.tally}",
            found.significant == 1 and found["English"][1].low > 0,
        )
    above = {"seq4": ["English"], "skip4": ["English"], "seq2": ["source code", "English"]}
    for arm in ("seq4", "skip4", "seq2", "pool4", "mod25"):
        found = BEST[f"{arm} - dense"]
        higher = [(text, i) for text, of in found.items() for i, d in enumerate(of) if d.low > 0]
        yield (
            f"{arm} is {found.tally}",
            higher == [(text, 1) for text in above.get(arm, [])]
            and len(higher) == found.significant,
        )


def words() -> Claims:
    smaller, larger = cases({"": WORDS}, "full2 - sum2").all
    yield (
        f"full2 minus sum2 is {smaller} at 6e11 FLOPs and {larger} at 1.8e12",
        smaller.significant and larger.significant,
    )
    yield (
        f"from {larger.widths[8]:+.3f} at width 8 to {larger.widths[56]:+.3f} at width 56",
        larger.varies
        and sum(mean < 0 for mean in larger.widths.values()) == len(larger.widths) - 1,
    )
    smaller, larger = cases({"": WORDS}, "recycled2 - dense").all
    yield (
        f"At equal width the difference is {smaller} at 6e11 FLOPs and {larger} at 1.8e12",
        smaller.low > 0 and larger.mean < 0 and not larger.significant,
    )
    wide, close = (
        {arm: found[1.8e12, f"{arm} - dense"] for arm in ("recycled2", "full2", "sum2")}
        for found in WORD_OPTIMA.values()
    )
    yield f"full2 minus dense is {close['full2']}", not close["full2"].significant
    yield f"sum2 minus dense is {close['sum2']}", close["sum2"].low > 0
    yield (
        f"recycled2 minus dense is {close['recycled2']} over the five sizes around each arm's best",
        close["recycled2"].high < 0,
    )
    yield (
        f"Over all eight sizes it is {wide['recycled2']}",
        not wide["recycled2"].significant
        and wide["recycled2"].high - wide["recycled2"].low
        > 2 * (close["recycled2"].high - close["recycled2"].low),
    )


def learning_rates() -> Claims:
    means = mean_rates(causal(RATES))
    behind = [by[x] - by[0.2] for by in means.values() for x in (0.1, 0.4)]
    yield (
        f"The shared rate, 0.2, is the best of the three for each of the seven, by "
        f"{min(behind):.3f} to {max(behind):.3f}",
        min(behind) > 0 and len(means) == 7,
    )
    again = compare.trained_twice(TRAINED["source code"], RATES)
    yield (
        f"The main sweep has the {len(again)} runs at 0.2 too, and they are equal to the last bit",
        len(again) == 21 and all(kept == trained for _, kept, trained in again),
    )


GIVEN = ("Learning rates were checked for 7 of the 19 arms",)
