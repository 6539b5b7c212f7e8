"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import cases, causal, loss, of_both_texts, own, rates
from experiments.tables import markdown, optimum_table, pair_table, rate_table
from modjax.records import RunRecord, read_csv
from modjax.scaling.formatting import budget as flops

HERE = Path(__file__).parent
TEXTS = {text: causal(records) for text, records in of_both_texts(HERE).items()}
VOCABULARY = {"source code": causal(read_csv(HERE / "vocabulary.csv"))}
RATES = causal(read_csv(HERE / "rates.csv"))
PAIRS = (
    *(f"{arm} - dense" for arm in (
        "recycled2", "recycled4", "full2", "same2", "sum2", "simplified4", "static2", "dynamic2",
        "manifold2", "moe", "altup-moe",
    )),
    "recycled2 - same2", "full2 - sum2", "full2 - recycled2", "manifold2 - dynamic2",
    "seq4 - skip4", "seq4 - pool4", "seq4 - mod25", "skip4 - mod25", "altup-mod12 - mod12",
    "altup-moe - moe",
)  # fmt: skip
# Whether experts gain more by AltUp than dense layers do.
DOUBLE = "altup-moe - moe - recycled2 + dense"
OPTIMA = {text: compare.optima(records, "dense") for text, records in TEXTS.items()}
NARROW = 0.005  # nats


def about_the_best(records: list[RunRecord], sizes: int = 5) -> list[RunRecord]:
    """Returns the runs of each arm's `sizes` sizes about its best one."""
    kept: list[RunRecord] = []
    for by_arm in compare.cells(records).values():
        for cells in by_arm.values():
            cells = sorted(cells, key=lambda runs: runs[0].params_non_embedding)
            start = cells.index(compare.best(cells)) - sizes // 2
            start = max(0, min(start, len(cells) - sizes))
            kept += itertools.chain(*cells[start : start + sizes])
    return kept


OF_VOCABULARY = {
    "all sizes": compare.optima(VOCABULARY["source code"], "dense"),
    "five sizes about the best": compare.optima(about_the_best(VOCABULARY["source code"]), "dense"),
}


def widths_table() -> str:
    rows = (
        (flops(budget), arm, ", ".join(f"{runs[0].d_model}: {loss(runs):.3f}" for runs in sizes))
        for budget, by_arm in compare.cells(VOCABULARY["source code"]).items()
        for arm, sizes in by_arm.items()
    )
    return markdown(("budget", "arm", "width: loss"), rows)


def tables() -> dict[str, str]:
    return {
        "pairs": pair_table(TEXTS, PAIRS),
        "double": pair_table(TEXTS, (DOUBLE,)),
        "optima": optimum_table(OPTIMA),
        "rates": rate_table(RATES),
        "vocabulary-widths": widths_table(),
        "vocabulary-pairs": pair_table(VOCABULARY, ("recycled2 - dense", "full2 - sum2")),
        "vocabulary-optima": optimum_table(OF_VOCABULARY),
    }


def claims() -> Iterator[tuple[str, bool]]:
    pair = {arms: cases(TEXTS, arms) for arms in (*PAIRS, DOUBLE)}
    best = {arms: own(OPTIMA, arms) for _, arms in OPTIMA["English"]}

    def more(arm: str) -> str:
        """Writes how many more FLOPs per token an arm takes than dense of its width."""
        ratios = [end - 1 for d in pair[f"{arm} - dense"].all for end in d.ratio]
        return f"{100 * min(ratios):.0f} to {100 * max(ratios):.0f}% for {arm}"

    for arm in ("manifold2", "full2", "dynamic2", "moe"):
        yield more(arm), True
    every = [d for arms in PAIRS for d in pair[arms].all]
    chance, told = compare.CHANCE * len(every), sum(d.told for d in every)
    varying = sum(d.varies for d in every)
    yield (
        f"{told} of the {len(every)} intervals leave 0 out, where about {chance:.0f} would by "
        f"chance, and {varying} of the {len(every)} differences depend on the width",
        told > 3 * chance,
    )
    needed = [(1.96 * d.error / NARROW) ** 2 * d.pairs for d in every]
    yield (
        f"an interval of {NARROW} on either side needs {min(needed):.0f} to {max(needed):.0f} "
        f"pairs by arms and budget, {statistics.median(needed):.0f} in the middle",
        True,
    )

    same, at_best = pair["same2 - dense"], best["same2 - dense"]
    yield f"At equal width, same2 less dense is {same}", same.below and same.told == 3
    yield f"at its own optimum it is {at_best.tally}", at_best.told == 0
    found = pair["recycled2 - same2"]
    yield (
        f"recycled2 is against same2 {found.tally}, on English at the larger budget",
        found.told == 1 and found["English"][1].low > 0,
    )
    found = pair["recycled2 - dense"]
    yield f"against dense {found.tally}", found.below and found.told == 0
    yield (
        f"recycled4 against dense {pair['recycled4 - dense'].tally}",
        pair["recycled4 - dense"].told == 0,
    )
    found = pair["full2 - sum2"]
    yield (
        f"against sum2, its wider embedding alone, full2 is {found.tally}",
        found["source code"][0].low > 0 and found["English"][1].high < 0,
    )
    found = pair["altup-moe - moe"]
    yield f"altup-moe less moe is {found}", found.below and found.told == 3
    for text, of in found.items():
        ends = of[1].widths
        yield (
            f"{ends[12]:+.3f} at width 12 and {ends[36]:+.3f} at 36 on {text}",
            of[1].varies and ends[12] < 0 < ends[36],
        )
    found = pair[DOUBLE]
    yield f"the difference of the two gains is {found}", found.below and found.told == 2
    found = pair["moe - dense"]
    yield (
        f"At equal width, experts alone are {found.tally} against dense",
        found.above and found.told == 4,
    )
    found = best["moe - dense"]
    yield (
        f"at their own optima {found.tally}, on source code at the smaller budget",
        (found.told == 1 and found["source code"][0].low > 0),
    )
    found = best["altup-moe - dense"]
    yield (
        f"With AltUp they are there {found.tally}, on English at the larger budget",
        (found.told == 1 and found["English"][1].high < 0),
    )
    found = pair["altup-mod12 - mod12"]
    yield (
        f"altup-mod12 is against mod12 {found.tally}, on English at the larger budget",
        found.told == 1 and found["English"][1].high < 0,
    )

    found = pair["static2 - dense"]
    yield (
        f"at equal width {found.tally}, both on English",
        all(d.high < 0 for d in found["English"]),
    )
    found = best["static2 - dense"]
    yield f"at the own optimum {found.tally}", found.told == 0
    for arm in ("dynamic2", "manifold2", "simplified4"):
        a, b = pair[f"{arm} - dense"], best[f"{arm} - dense"]
        yield (
            f"{arm} is {a.tally} at equal width and {b.tally} at its own optimum",
            a.above and b.above,
        )
    found = pair["manifold2 - dynamic2"]
    yield (
        f"manifold2 is against dynamic2 {found.tally}, both at the larger budget",
        found.told == 2 and all(of[1].low > 0 for of in found.values()),
    )

    yield f"seq4 is against skip4 {pair['seq4 - skip4'].tally}", pair["seq4 - skip4"].told == 0
    for control in ("pool4", "mod25"):
        found = pair[f"seq4 - {control}"]
        yield (
            f"against {control} seq4 is {found.tally}",
            found.told == 1 and found["English"][1].low > 0,
        )
    above = {"seq4": ["English"], "skip4": ["English"], "seq2": ["source code", "English"]}
    for arm in ("seq4", "skip4", "seq2", "pool4", "mod25"):
        found = best[f"{arm} - dense"]
        told = [(text, i) for text, of in found.items() for i, d in enumerate(of) if d.low > 0]
        yield (
            f"{arm} is {found.tally}",
            (told == [(text, 1) for text in above.get(arm, [])] and len(told) == found.told),
        )

    smaller, larger = cases(VOCABULARY, "full2 - sum2").all
    yield (
        f"full2 less sum2 is {smaller} at 6e11 FLOPs and {larger} at 1.8e12",
        smaller.told and larger.told,
    )
    yield (
        f"from {larger.widths[8]:+.3f} at width 8 to {larger.widths[56]:+.3f} at 56",
        larger.varies
        and sum(mean < 0 for mean in larger.widths.values()) == len(larger.widths) - 1,
    )
    smaller, larger = cases(VOCABULARY, "recycled2 - dense").all
    yield (
        f"At equal width it is {smaller} at 6e11 FLOPs and {larger} at 1.8e12",
        smaller.low > 0 and larger.mean < 0 and not larger.told,
    )
    wide, close = (
        {arm: of[1.8e12, f"{arm} - dense"] for arm in ("recycled2", "full2", "sum2")}
        for of in OF_VOCABULARY.values()
    )
    yield f"full2 less dense is {close['full2']} and sum2 {close['sum2']}", close["sum2"].low > 0
    yield "not told for full2", not close["full2"].told
    yield (
        f"recycled2 less dense is {close['recycled2']} over the five sizes about each arm's best",
        close["recycled2"].high < 0,
    )
    yield (
        f"Over all eight it is {wide['recycled2']}",
        not wide["recycled2"].told
        and wide["recycled2"].high - wide["recycled2"].low
        > 2 * (close["recycled2"].high - close["recycled2"].low),
    )
    means = {
        arm: {x: statistics.mean(of) for x, of in by.items()} for arm, by in rates(RATES).items()
    }
    behind = [by[x] - by[0.2] for by in means.values() for x in (0.1, 0.4)]
    yield (
        f"The shared rate, 0.2, is the best of the three for each of the seven, by "
        f"{min(behind):.3f} to {max(behind):.3f}",
        min(behind) > 0 and len(means) == 7,
    )
    again = [
        (kept.eval_loss, r.eval_loss)
        for r in read_csv(HERE / "rates.csv")
        for kept in read_csv(HERE / "stdlib.csv")
        if r.variant == f"{kept.variant}-lr0_2"
        and (r.budget_flops, r.d_model, r.seed, r.batch_size)
        == (kept.budget_flops, kept.d_model, kept.seed, kept.batch_size)
    ]
    yield (
        f"The {len(again)} runs at 0.2, which the sweep has, too, are equal to the last bit",
        len(again) == 21 and all(kept == trained for kept, trained in again),
    )
    runs = [r for records in TEXTS.values() for r in records]
    sizes, read = [r.params_non_embedding for r in runs], [r.tokens for r in runs]
    yield (
        f"The models have {min(sizes) / 1e6:.3f} to {max(sizes) / 1e6:.2f} million non-embedding "
        f"parameters and read {min(read) / 1e6:.1f} to {max(read) / 1e6:.1f} million bytes",
        True,
    )


GIVEN = ("Learning rates were checked for 7 of the 19 arms",)
