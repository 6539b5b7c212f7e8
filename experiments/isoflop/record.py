"""Tables and claims of README.md, held against the kept runs; see experiments/check.py."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments import compare
from experiments.compare import cases, optima, own
from experiments.tables import markdown, optimum_table, pair_table
from modjax.records import read_csv
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.fit.results import Gap, to_json
from modjax.scaling.formatting import budget as flops
from modjax.scaling.formatting import count
from modjax.scaling.report.prose import fixed, span

HERE = Path(__file__).parent
TRAINED = read_csv(HERE / "results.csv")
TEXTS = {"as trained": TRAINED, "selecting causally": compare.causal(TRAINED)}
FITS = fit_all(TRAINED, baseline="dense", loss="trained")
OPTIMA = {loss: optima(records, "dense", "random12") for loss, records in TEXTS.items()}
LEARNED = "mod12 - random12"
ROUTED = [r for r in TRAINED if r.variant == "mod12" and r.budget_flops == 1.8e12]


def against(gap: Gap | None) -> tuple[str, str]:
    if gap is None:
        return "", ""
    return (
        f"{gap.percent:+.1f}% ({span(gap.percent_interval, fixed(1, '+'))})",
        f"{gap.flops_ratio:.2f} ({span(gap.flops_ratio_interval, fixed(2))})",
    )


def fit_table() -> str:
    gaps = {(gap.arm, gap.budget_flops): gap for gap in FITS.gaps}

    def rows() -> Iterator[list[str]]:
        for p in sorted(FITS.parabolas, key=lambda p: p.budget_flops):
            if p.quantity == "parameters":
                other = FITS.parabola(p.arm, p.budget_flops, "forward_flops")
                yield [
                    flops(p.budget_flops), p.arm,
                    f"{count(p.optimum)} ({span(p.optimum_interval, count)})", f"{p.loss:.3f}",
                    count(other.optimum),
                    *against(gaps.get((p.arm, p.budget_flops))),
                ]  # fmt: skip

    columns = (
        "budget", "arm", "non-embedding parameters", "loss, nats per byte",
        "forward FLOPs per token", "loss against dense", "these FLOPs against dense",
    )  # fmt: skip
    return markdown(columns, rows())


def tables() -> dict[str, str]:
    random = {
        loss: {k: d for k, d in of.items() if k[1] != "dense - random12"}
        for loss, of in OPTIMA.items()
    }
    return {
        "fits": fit_table(),
        "optima": optimum_table(random),
        "pairs": pair_table(TEXTS, (LEARNED,)),
    }


def claims() -> Iterator[tuple[str, bool]]:
    kept = json.loads((HERE / "fit.json").read_text(encoding="utf-8"))
    again = to_json(FITS)
    yield (
        "`fit.json` every fit",
        all(
            abs(a[name] - b[name]) < 1e-9
            for kind, name in (("gaps", "loss"), ("parabolas", "optimum"), ("parabolas", "loss"))
            for a, b in zip(kept[kind], again[kind], strict=True)
        ),
    )
    for loss, of in OPTIMA.items():
        yield f"told in {own({loss: of}, 'mod12 - dense').told or 'none'} of three {loss}", True
    accepted = [p for p in FITS.parabolas if p.off_centre is not None]
    yield (
        "All nine vertices lie inside their range, none of them more than half way to its end",
        len(accepted) == 18 and all(abs(p.off_centre) < 0.5 for p in accepted if p.off_centre),
    )
    below = cases({"": TRAINED}, LEARNED)
    yield f"at equal width and seed {below.all[2]} at 1.8e12 FLOPs", below.all[2].high < 0
    yield "not told at the two smaller budgets", not any(d.told for d in below.all[:2])
    found = own({"": OPTIMA["as trained"]}, LEARNED)
    yield (
        f"{', '.join(f'{d.mean:+.3f}' for d in found.all)} nats at the three optima",
        found.told == 0,
    )
    apart = [
        statistics.stdev(r.eval_loss or 0 for r in runs)
        for by_arm in compare.cells(TRAINED).values() for sizes in by_arm.values() for runs in sizes
    ]  # fmt: skip
    yield (
        f"The two seeds of a cell have a standard deviation of {statistics.median(apart):.3f} "
        "in the median",
        True,
    )
    laws = {law.arm: law for law in FITS.laws if law.quantity == "parameters"}
    for arm in ("mod12", "random12"):
        law = laws[arm]
        yield f"C^{law.exponent:.2f} ({span(law.exponent_interval, fixed(2))}) for {arm}", True
    law = laws["dense"]
    yield (
        f"Dense's exponent, {law.exponent:.2f}, is not determined by its three optima",
        law.exponent_interval[0] < 0 < 1 < law.exponent_interval[1],
    )
    changes = [r.causal_difference for r in ROUTED]
    yield (
        f"the ten runs of mod12 at 1.8e12 lose {statistics.mean(changes):.4f} nats on average "
        f"({min(changes):+.4f} to {max(changes):+.4f})",
        len(changes) == 10,
    )
    right = [r.outcome["causal/accuracy"] for r in ROUTED]
    yield (
        f"right at {statistics.mean(right):.1%} of the positions "
        f"({min(right):.1%} to {max(right):.1%})",
        min(right) > 0.875,
    )
    spent = sum(r.train_flops for r in TRAINED)
    hours = sum(r.wall_seconds for r in TRAINED) / 3600
    yield f"{hours:.1f} hours summed over runs", len(TRAINED) == 90
    yield f"{spent:.1e}".replace("e+", "e") + " training FLOPs", True
    read = [r.epochs for r in TRAINED]
    yield f"each run reads {min(read):.0%} to {max(read):.0%} of it once", max(read) < 1
    for arm, says in (
        ("mod12", "told at the two larger budgets"),
        ("random12", "at the two larger budgets, too"),
    ):
        ends = [gap.flops_ratio_interval for gap in FITS.gaps if gap.arm == arm]
        yield says, [high < 0.995 for _, high in ends] == [False, True, True]


# Of the plan, the paper, and the machine.
GIVEN = (
    "(12.5% capacity, every other block)",
    "jax 0.10.2",
    "Python 3.11's standard library as bytes, 11.3 million tokens",
    "The paper's 1.5% at 6e18",
    "are centred on 0.7",
    '"no" would be at 87.5%',
    "mean over the last 5% of the run's steps",
)
