"""The report of a sweep: one self-contained HTML file with figures, fits and every run.

The page refers to nothing outside itself: template/ holds its text, its styles and its script, and
the figures are inline SVG whose marks show their run on hover.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from modjax.errors import InputError
from modjax.files import write_atomically
from modjax.provenance import differences
from modjax.records import RunRecord, run_dir, write_csv, write_json
from modjax.scaling.fit.comparable_runs import lenient_json, lenient_plan, under, with_loss
from modjax.scaling.fit.isoflop import fit_workdir
from modjax.scaling.fit.results import Fits, to_json
from modjax.scaling.formatting import budget, count
from modjax.scaling.report import markers, prose, tables
from modjax.scaling.report.figures import draw_all
from modjax.scaling.report.learning_curves import FRONTIER_STEPS, SHARE, read_curves
from modjax.scaling.report.spec_differences import Specs, read_specs
from modjax.scaling.report.tables import Table


def report(workdir: Path, loss: str = "causal", size: str = "non_embedding") -> Path:
    """Writes report.html, results.csv, fit.json and figures/ into `workdir`.

    Returns the path of the HTML file. Raises InputError as `fit_workdir` does.
    """
    found, fits = fit_workdir(workdir, loss, size)
    write_json(workdir / "fit.json", to_json(fits))
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

    figures: the SVG file of each figure, by name.
    left_out: folder name -> why the run is in no table.
    lacking: run id -> what is missing from the run's curve.
    """
    plan = lenient_plan(workdir)
    specs = read_specs(workdir, records)
    compared = [with_loss(r, fits.loss) for r in records]
    tipped = len(records) <= markers.MANY
    tips = _tips(records if tipped else [], fits)
    fits = prose.marked(fits)
    others = ", ".join(arm for arm in fits.arms if arm != fits.baseline)
    exceptions = list(_exceptions(compared, fits, left_out, lacking))
    exceptions += _missing(workdir, plan, {*left_out, *(r.run_id for r in records)})
    no_causal_loss = [prose.no_causal_sentence(one, fits.loss) for one in fits.no_causal_loss]
    settings = {name: value for name, value in plan.items() if name != "runs"}
    return _template().render(
        title=f"modjax: {others} against {fits.baseline}" if others else f"modjax: {fits.baseline}",
        fits=fits,
        headline=[*no_causal_loss, *map(prose.gap_sentence, fits.gaps)],
        facts=_facts(compared, plan),
        figures={name: inline_svg(path.read_text("utf-8"), name) for name, path in figures.items()},
        loss=prose.LOSSES[fits.loss],
        share=f"{SHARE:.0%}",
        frontier_steps=FRONTIER_STEPS,
        method=prose.method(fits),
        sentences=prose.sentences(fits)[len(fits.gaps) :],  # the gaps open the page
        tables=[tables.optimum_table(fits), tables.gap_table(fits), tables.law_table(fits)],
        seeds=tables.seed_table(fits.repeats),
        no_causal_loss=no_causal_loss,
        as_trained=tables.as_trained_table(fits.no_causal_loss),
        exceptions=exceptions or ["None: every planned run finished and every fit was accepted."],
        runs=tables.run_table(records, fits, specs),
        tipped=tipped,
        shared=_shared_table(specs),
        arms=_arm_table(specs),
        settings=json.dumps(settings, indent=1) if plan else "",
        tips=tips,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("modjax.scaling.report", "template"),
        autoescape=True,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("page.html")


def _cell(value: object) -> tuple[str, str]:
    """Returns what a cell shows, and what to sort it by if that differs.

    Rounds floats, leaves text as it is, and shows other values as JSON. The sort key has the 7
    digits of a float32. page.js can sort integers with thousands separators.
    """
    if isinstance(value, float):
        shown = budget(value) if 1e5 <= abs(value) < math.inf else f"{value:.4g}"
        return shown, "" if float(shown) == value else f"{value:.7g}"
    if type(value) is int:
        return f"{value:,}", ""
    if value is None or isinstance(value, str):
        return value or "", ""
    return json.dumps(value), ""


def _tips(records: Sequence[RunRecord], fits: Fits) -> dict[str, str]:
    """Returns the text that hovering a run or an optimum shows, by its mark's id."""
    tips = {f"run:{r.run_id}": run_tip(r) for r in records}
    for p in fits.parabolas:
        if p.quantity == "parameters":
            tips[f"optimum:{p.arm}:{p.budget_flops}"] = prose.parabola_sentence(p, fits.size)
    return tips


def run_tip(r: RunRecord) -> str:
    """Returns the text that hovering a run shows."""
    loss = f"diverged at step {r.diverged_step}"
    if r.eval_loss is not None:
        loss = f"{prose.loss_text(r)} ± {r.eval_loss_sem or 0:.4f} nats per token"
    return (
        f"{r.run_id}\n{r.variant} at {budget(r.budget_flops)} FLOPs, seed {r.seed}\n{loss}\n"
        f"{count(r.params_non_embedding)} non-embedding parameters "
        f"(total {count(r.params_total)}): width {r.d_model}, {r.num_layers} layers\n"
        f"{count(r.forward_flops_per_token)} forward FLOPs per token\n"
        f"{count(r.tokens)} tokens in {r.steps} steps, learning rate {r.learning_rate:.2g}"
    )


def _facts(records: Sequence[RunRecord], plan: Mapping[str, Any]) -> dict[str, object]:
    """Returns the facts of the sweep that open the page."""
    finished = sum(r.status == "finished" for r in records)
    versions = {f"{name} {v}" for r in records for name, v in r.versions.items()}
    code = {f"modjax {r.code_version}" for r in records}
    return {
        "Command": plan.get("command", "not recorded: this folder has no plan.json"),
        "Config file": plan.get("config_file", "not recorded"),
        "Runs": f"{finished} finished, {len(records) - finished} diverged, of "
        f"{len(plan.get('runs', records))} planned",
        "Time": f"{sum(r.wall_seconds for r in records) / 60:.1f} minutes, summed over runs",
        "Device": ", ".join(sorted({r.device for r in records})),
        "Versions": ", ".join([*sorted(code), *sorted(versions)]),
        "Data": ", ".join(sorted({r.data_fingerprint for r in records})),
    }


def _exceptions(
    records: Sequence[RunRecord],
    fits: Fits,
    left_out: Mapping[str, str],
    lacking: Mapping[str, str],
) -> Iterator[str]:
    """Yields a sentence for everything that is not as planned, except missing runs."""
    for name, why in left_out.items():
        yield f"{name} is left out: {why}."
    for run_id, why in lacking.items():
        yield f"The learning curve of {run_id} {why}."
    for r in records:
        if r.status == "diverged":
            yield f"{r.run_id} diverged at step {r.diverged_step} and is left out of every fit."
    for difference in differences(records):
        yield f"{difference}."
    for p in fits.parabolas:
        if p.refusal is not None:
            yield prose.parabola_sentence(p, fits.size)


def _missing(workdir: Path, plan: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    """Yields planned runs that are not among `known`, with the reason if one is recorded."""
    for run_id in plan.get("runs", []):
        if run_id not in known:
            failure = None
            with contextlib.suppress(InputError):  # a damaged plan may name what is no run
                failure = lenient_json(run_dir(workdir, run_id) / "failure.json")
            why = f"given up: {json.dumps(failure)}" if failure else "not finished"
            yield f"{run_id} has no result ({why})."


def _shared_table(specs: Specs) -> Table:
    rows = [(name, json.dumps(value)) for name, value in specs.shared.items()]
    return Table(("field", "value"), rows)


def _arm_table(specs: Specs) -> Table:
    fields = [name for name in specs.arm_fields if name != "variant"]
    rows = [(arm, *map(spec.get, fields)) for arm, spec in specs.by_arm.items()]
    return Table(("arm", *fields), rows if fields else [])


def inline_svg(source: str, name: str) -> Markup:
    """Returns a matplotlib SVG as part of a page, without prologue and namespaces.

    Its colours follow the page. `id="run:..."` and `id="optimum:..."` become `data-tip`, because a
    run is in several figures. Every other id gets the figure's name as a prefix.
    """
    svg = source[source.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'id="((?:run|optimum):[^"]*)"', r'data-tip="\1" tabindex="0"', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = svg.replace(markers.INK, "currentColor").replace(markers.SURFACE, "var(--surface)")
    return Markup(svg.replace(markers.FAINT, "var(--faint)"))
