"""Tables and claims of README.md, checked against the kept runs; see experiments/check.py."""

import json
import math
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
    """Formats the loss and the FLOPs of an arm's optimum against those of dense."""
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
                size = f"{count(p.optimum)} ({span(p.optimum_interval, count)})"
                optimum = (size, f"{p.loss:.3f}", count(other.optimum))
                gap = against(gaps.get((p.arm, p.budget_flops)))
                yield [flops(p.budget_flops), p.arm, *optimum, *gap]

    optimum = ("non-embedding parameters", "loss, nats per byte", "forward FLOPs per token")
    against_dense = ("loss against dense", "these FLOPs against dense")
    return markdown(("budget", "arm", *optimum, *against_dense), rows())


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
    yield from kept_fits()
    yield from against_dense()
    yield from against_random()
    yield from laws()
    yield from selecting_causally()
    yield from cost()


def kept_fits() -> Iterator[tuple[str, bool]]:
    kept = json.loads((HERE / "fit.json").read_text(encoding="utf-8"))
    again = to_json(FITS)
    yield (
        "`fit.json` has every fit",
        all(
            abs(a[name] - b[name]) < 1e-9
            for kind, name in (("gaps", "loss"), ("parabolas", "optimum"), ("parabolas", "loss"))
            for a, b in zip(kept[kind], again[kind], strict=True)
        ),
    )
    accepted = [p for p in FITS.parabolas if p.off_centre is not None]
    yield (
        "All nine vertices lie inside their range, none of them more than half way to its end",
        len(accepted) == 18 and all(abs(p.off_centre) < 0.5 for p in accepted if p.off_centre),
    )


def against_dense() -> Iterator[tuple[str, bool]]:
    for loss, found in OPTIMA.items():
        significant = own({loss: found}, "mod12 - dense").significant
        yield f"{significant or 'none'} of the three differences is significant {loss}", True
    ratios = [gap.flops_ratio for gap in FITS.gaps if gap.arm == "mod12"]
    yield f"with {min(ratios):.2f} to {max(ratios):.2f} of its forward FLOPs per token", True
    for arm, says in (
        ("mod12", "significant at the two larger budgets"),
        ("random12", "also at the two larger budgets"),
    ):
        ends = [gap.flops_ratio_interval for gap in FITS.gaps if gap.arm == arm]
        yield says, [high < 0.995 for _, high in ends] == [False, True, True]


def against_random() -> Iterator[tuple[str, bool]]:
    at_optima = own({"": OPTIMA["as trained"]}, LEARNED)
    yield (
        f"{', '.join(f'{d.mean:+.3f}' for d in at_optima.all)} nats at the three optima",
        at_optima.significant == 0,
    )
    equal = cases({"": TRAINED}, LEARNED).all
    yield f"At equal width and seed it is {equal[2]} at 1.8e12 FLOPs", equal[2].high < 0
    yield "not significant at the two smaller budgets", not any(d.significant for d in equal[:2])
    # Two values have a standard deviation of their difference over sqrt(2).
    spread = compare.seed_difference(TRAINED) / math.sqrt(2)
    yield (
        f"The two seeds of a cell have a standard deviation of {spread:.3f} in the median",
        True,
    )


def laws() -> Iterator[tuple[str, bool]]:
    found = {law.arm: law for law in FITS.laws if law.quantity == "parameters"}
    for arm in ("mod12", "random12"):
        law = found[arm]
        yield f"C^{law.exponent:.2f} ({span(law.exponent_interval, fixed(2))}) for {arm}", True
    law = found["dense"]
    yield (
        f"Dense's exponent, {law.exponent:.2f}, is not determined by its three optima",
        law.exponent_interval[0] < 0 < 1 < law.exponent_interval[1],
    )


def selecting_causally() -> Iterator[tuple[str, bool]]:
    changes = [r.causal_difference for r in ROUTED]
    yield (
        f"the ten runs of mod12 at 1.8e12 FLOPs lose {statistics.mean(changes):.4f} nats on "
        f"average ({min(changes):+.4f} to {max(changes):+.4f})",
        len(changes) == 10,
    )
    right = [r.outcome["causal/accuracy"] for r in ROUTED]
    yield (
        f"right at {statistics.mean(right):.1%} of the positions "
        f"({min(right):.1%} to {max(right):.1%})",
        min(right) > 0.875,
    )


def cost() -> Iterator[tuple[str, bool]]:
    hours = sum(r.wall_seconds for r in TRAINED) / 3600
    yield f"{hours:.1f} hours summed over the runs", len(TRAINED) == 90
    spent = sum(r.train_flops for r in TRAINED)
    yield f"{spent:.1e}".replace("e+", "e") + " training FLOPs", True
    read = [r.epochs for r in TRAINED]
    yield f"Each run reads {min(read):.0%} to {max(read):.0%} of it, at most once", max(read) < 1


# From the plan, the paper, and the machine.
GIVEN = (
    "a capacity of 12.5%",
    "jax 0.10.2",
    "Python 3.11's standard library as bytes, 11.3 million tokens",
    "The paper's 1.5% at 6e18",
    "are centred on 0.7",
    'Always answering "no" is right at 87.5%',
    "mean over the last 5% of the run's steps",
)
