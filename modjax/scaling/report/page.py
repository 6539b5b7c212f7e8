"""One self-contained HTML file for a sweep: figures, fits in words and numbers, and every run.

It refers to nothing outside itself: styles and the script (report.css, report.js beside this
file) are written into it, and so are the figures, as SVG whose marks show their run on hover.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from modjax.errors import InputError, require
from modjax.files import read_json, write_atomically
from modjax.provenance import differences
from modjax.records import RunRecord, Scan, name_left_out, run_dir, scan, write_csv
from modjax.scaling.fit.cells import comparable
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.fit.learning_curves import FRONTIER_STEPS, SHARE, read_curves
from modjax.scaling.fit.results import Fits, as_compared, save_json, under
from modjax.scaling.formatting import budget, count
from modjax.scaling.report import prose as words
from modjax.scaling.report.comparison import LOSSES, loss_words, marked, no_causal_sentence
from modjax.scaling.report.differences import Specs, compare, flatten
from modjax.scaling.report.figures import draw_all
from modjax.scaling.report.html import bullets, details, inline_svg, script, table, text
from modjax.scaling.report.markers import MANY
from modjax.scaling.report.tables import (
    gap_table,
    law_table,
    no_causal_table,
    repeat_table,
    run_table,
)

CAPTIONS = {
    "isoflop": "{loss} against parameters, one panel per budget. Lines are parabolas in "
    "log N over the sampled sizes; large hollow marks are their minima, dropped to the 95% "
    "interval of the optimal size. A cross is a diverged run, placed by its size alone.",
    "normalised": "{loss} relative to the optimal {baseline} model of the same budget against "
    "forward FLOPs per token relative to it. Below 1 is better, left of 1 is cheaper to run.",
    "curves": f"Training loss, as the mean over a trailing window of {SHARE:.0%} of the run's "
    "steps, against training FLOPs: every run thin, and thick the least mean that any run of the "
    f"arm has reached by then, of windows of {FRONTIER_STEPS} steps or more. The least of many "
    "leans to the lucky by about the noise of such a mean. Runs decay their learning rate to the "
    "end, so only their ends are comparable. These losses are those of training, which may look "
    "ahead or drop picks of experts: arms are not compared by them.",
    "optima": "Left: the optimal size with its power law. Right: {loss} at the arm's own optimum "
    "against {baseline}'s at its own. Bars are 95% intervals; a dotted line is one that is open at "
    "an end.",
}
DEEPEST = 20  # levels of groups and lists in the JSON of a sweep, with room


def fit_workdir(
    workdir: Path, loss: str = "causal", size: str = "non_embedding"
) -> tuple[Scan, Fits]:
    """Returns the runs that can be compared, those left out, and the fits. Warns of those left out.

    loss: "causal" or "trained", see results.under. size: see results.SIZES. Arms are compared with
    the plan's baseline; where no run of it can be compared, as in `fit_all`.

    Raises InputError where no run that can be read has finished or diverged yet, or none has this
    loss.
    """
    found = scan(workdir)
    first = next(iter(found.left_out.values()), "")
    require(
        len(found.records) > 0,
        "--workdir",
        str(workdir),
        f"holds no finished run; `modjax sweep` makes them{f'; left out: {first}' * bool(first)}",
    )
    records, apart = comparable(found.records)
    found = Scan(records, found.left_out | apart)
    name_left_out(found.left_out)
    config = _plan(workdir).get("config")
    sweep = config.get("sweep") if isinstance(config, dict) else None
    planned = sweep.get("baseline") if isinstance(sweep, dict) else None
    compared = under(records, loss).records
    baseline = planned if any(record.variant == planned for record in compared) else None
    return found, fit_all(records, size=size, loss=loss, baseline=baseline)


def report(workdir: Path, loss: str = "causal", size: str = "non_embedding") -> Path:
    """Writes report.html, results.csv, fit.json and figures/ into `workdir`.

    Returns the path of the HTML file.

    Raises InputError as `fit_workdir` does.
    """
    found, fits = fit_workdir(workdir, loss, size)
    save_json(workdir / "fit.json", fits)
    write_csv(workdir / "results.csv", found.records)  # whatever loss is fitted
    compared = under(found.records, loss).records
    curves, lacking = read_curves(workdir, compared)
    figures = draw_all(compared, fits, curves, workdir / "figures")
    path = workdir / "report.html"
    page = render(workdir, found.records, fits, figures, left_out=found.left_out, lacking=lacking)
    write_atomically(path, page.encode(errors="replace"))
    return path


def render(
    workdir: Path,
    records: Sequence[RunRecord],
    fits: Fits,
    figures: Mapping[str, Path],
    *,
    left_out: Mapping[str, str] = {},
    lacking: Mapping[str, str] = {},
) -> str:
    """Returns the whole page.

    figures: the SVG file of each by its name.
    left_out, lacking: why a run is in no table, and what its curve lacks, by its folder's name.
    """
    plan = _plan(workdir)
    specs = _specs(workdir, records)
    compared = [as_compared(r, fits.loss) for r in records]
    tipped = len(records) <= MANY
    tips = {f"run:{r.run_id}": run_tip(r) for r in records if tipped}
    tips |= {
        f"optimum:{p.arm}:{p.budget_flops}": words.parabola_sentence(p, fits.size)
        for p in fits.parabolas
        if p.quantity == "parameters"
    }
    fits = marked(fits)
    others = [arm for arm in fits.arms if arm != fits.baseline]
    title = f"modjax: {', '.join(others)}{' against ' * bool(others)}{fits.baseline}"
    body = [
        f"<h1>{text(title)}</h1>",
        *_summary(workdir, compared, fits, plan),
        "<h2>Figures</h2>",
        *(_figure(name, path, fits) for name, path in figures.items()),
        "<h2>Fits in words</h2>",
        f"<p>{text(words.method(fits))}</p>",
        bullets(words.sentences(fits)[len(fits.gaps) :]),  # the gaps open the page
        "<h2>Fits in numbers</h2>",
        table(words.HEADER, words.rows(fits)),
        *gap_table(fits),
        *law_table(fits),
        *repeat_table(fits),
        *no_causal_table(fits),
        "<h2>Diverged, refused and missing</h2>",
        bullets(_exceptions(workdir, compared, fits, plan, left_out, lacking)),
        "<h2>Runs</h2>",
        "<p>Click a heading to sort. N counts non-embedding parameters; losses are in nats per "
        f"token, and arms are compared by the {fits.loss} loss. All fields are in results.csv "
        "beside this file.</p>",
        run_table(records, fits, specs, tipped),
        "<h2>Config</h2>",
        *_config(plan, specs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>{_resource('report.css')}</style>"
        f"</head>\n<body>\n<main>\n{chr(10).join(body)}\n</main>\n"
        '<div id="tip" role="tooltip" hidden></div>\n'
        f'<script type="application/json" id="tips">{script(tips)}</script>\n'
        f"<script>{_resource('report.js')}</script>\n</body></html>\n"
    )


def _resource(name: str) -> str:
    return (files("modjax.scaling.report") / name).read_text("utf-8")


def run_tip(r: RunRecord) -> str:
    """Returns the text that hovering a run shows."""
    loss = (
        f"{loss_words(r)} ± {r.eval_loss_sem or 0:.4f} nats per token"
        if r.eval_loss is not None
        else f"diverged at step {r.diverged_step}"
    )
    return (
        f"{r.run_id}\n{r.variant} at {budget(r.budget_flops)} FLOPs, seed {r.seed}\n{loss}\n"
        f"{count(r.params_non_embedding)} non-embedding parameters "
        f"(total {count(r.params_total)}): width {r.d_model}, {r.num_layers} layers\n"
        f"{count(r.forward_flops_per_token)} forward FLOPs per token\n"
        f"{count(r.tokens)} tokens in {r.steps} steps, learning rate {r.learning_rate:.2g}"
    )


def _summary(
    workdir: Path, records: Sequence[RunRecord], fits: Fits, plan: dict[str, Any]
) -> list[str]:
    finished = sum(r.status == "finished" for r in records)
    devices = sorted({r.device for r in records})
    versions = sorted({f"{name} {v}" for r in records for name, v in r.versions.items()})
    code = sorted({r.code_version for r in records})
    facts = {
        "Command": plan.get("command", "not recorded: this folder has no plan.json"),
        "Config file": plan.get("config_file", "not recorded"),
        "Runs": f"{finished} finished, {len(records) - finished} diverged, of "
        f"{len(plan.get('runs', records))} planned",
        "Time": f"{sum(r.wall_seconds for r in records) / 60:.1f} minutes, summed over runs",
        "Device": ", ".join(devices),
        "Versions": ", ".join([*(f"modjax {c}" for c in code), *versions]),
        "Data": ", ".join(sorted({r.data_fingerprint for r in records})),
    }
    rows = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items())
    headline = [no_causal_sentence(one, fits.loss) for one in fits.no_causal_loss]
    headline += [words.gap_sentence(gap) for gap in fits.gaps]
    return [bullets(headline) if headline else "", f'<dl class="facts">{rows}</dl>']


def _figure(name: str, path: Path, fits: Fits) -> str:
    loss = LOSSES[fits.loss]
    loss = loss if name == "optima" else loss.capitalize()
    caption = CAPTIONS[name].format(baseline=fits.baseline, loss=loss)
    svg = inline_svg(path.read_text(encoding="utf-8"), name)
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def _exceptions(
    workdir: Path,
    records: Sequence[RunRecord],
    fits: Fits,
    plan: dict[str, Any],
    left_out: Mapping[str, str],
    lacking: Mapping[str, str],
) -> list[str]:
    said = [f"{name} is left out: {why}." for name, why in left_out.items()]
    said += [f"The learning curve of {run_id} {why}." for run_id, why in lacking.items()]
    said += [
        f"{r.run_id} diverged at step {r.diverged_step} and is left out of every fit."
        for r in records
        if r.status == "diverged"
    ]
    said += [f"{difference}." for difference in differences(records)]
    said += [words.parabola_sentence(p, fits.size) for p in fits.parabolas if p.refusal is not None]
    known = {*left_out, *(r.run_id for r in records)}
    for run_id in plan.get("runs", []):
        if run_id not in known:
            failure = None
            with contextlib.suppress(InputError):  # a damaged plan may name what is no run
                failure = _json(run_dir(workdir, run_id) / "failure.json")
            why = f"given up: {json.dumps(failure)}" if failure else "not finished"
            said.append(f"{run_id} has no result ({why}).")
    return said or ["None: every planned run finished and every fit was accepted."]


def _config(plan: dict[str, Any], specs: Specs) -> list[str]:
    """What all runs share, what each arm has of its own, and the config as the plan keeps it."""
    parts = []
    if specs.shared:
        rows = [(name, json.dumps(value)) for name, value in specs.shared.items()]
        parts += ["<h3>The same in every run</h3>", table(("field", "value"), rows)]
    fields = [name for name in specs.arm_fields if name != "variant"]
    if fields:
        rows = [(arm, *map(of.get, fields)) for arm, of in specs.by_arm.items()]
        parts += ["<h3>The same in every run of an arm</h3>", table(("arm", *fields), rows)]
    if plan:
        settings = {name: value for name, value in plan.items() if name != "runs"}
        parts.append(details("plan.json, without its list of runs", settings))
    return parts


def _specs(workdir: Path, records: Sequence[RunRecord]) -> Specs:
    read = ((r.run_id, _json(run_dir(workdir, r.run_id) / "spec.json")) for r in records)
    found = {
        run_id: {sys.intern(name): value for name, value in flatten(spec)}
        for run_id, spec in read
        if spec
    }
    return compare(found, {r.run_id: r.variant for r in records})


def _plan(workdir: Path) -> dict[str, Any]:
    """plan.json, without a list of runs that is none."""
    plan = _json(workdir / "plan.json")
    runs = plan.get("runs")
    if not (isinstance(runs, list) and all(isinstance(run_id, str) for run_id in runs)):
        plan.pop("runs", None)
    return plan


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of the sweep's, or {} where it is missing or damaged: the report goes on."""
    try:
        values = read_json(path, "")
    except InputError:
        return {}
    return values if isinstance(values, dict) and not _deeper(values, DEEPEST) else {}


def _deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    """Whether groups and lists lie in one another more than `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value
    groups = (item for item in inner if isinstance(item, dict | list))
    return levels == 0 or any(_deeper(group, levels - 1) for group in groups)
