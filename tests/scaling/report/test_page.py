import csv
import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest

from modjax.errors import InputError
from modjax.scaling.fit.isoflop import fit_all, fit_workdir
from modjax.scaling.report import markers
from modjax.scaling.report.page import render, report


@pytest.fixture
def page(make_sweep, make_workdir):
    """A report on a sweep with a diverged run, a refused fit, a missing run and hostile text."""
    records = make_sweep(budgets=(1e12, 1e13), noise=0.003)
    records[0] = dataclasses.replace(
        records[0], status="diverged", eval_loss=None, diverged_step=42, device="<b>TPU</b>"
    )
    records = [r for r in records if r.run_id not in ("mod-1e+13-n0-s0", "mod-1e+13-n1-s0")]
    workdir = make_workdir(records)
    path = report(workdir)
    return records, workdir, path.read_text()


class Page(HTMLParser):
    """Attributes of every element, and the open elements at the end."""

    def __init__(self, text):
        super().__init__()
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def test_the_report_tells_the_whole_sweep_and_needs_no_network(page):
    records, workdir, text = page
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    parsed = Page(text)
    assert not [a for a in parsed.attributes if a[1] == "src" or a[0] == "link"]
    assert all(value.startswith("#") for _, name, value in parsed.attributes if name == "href")

    assert all(r.run_id in text for r in records)
    assert "modjax sweep --config=configs/tiny.py --workdir=here" in text
    assert "dense-1e+12-not-run has no result" in text
    assert "diverged at step 42" in text
    assert "no optimum in non-embedding parameters: 3 finished sizes" in text
    assert "&lt;b&gt;TPU" in text and "<b>TPU" not in text
    assert "jax 0.10.2" in text and "model.vocab" in text

    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in parsed.attributes if name == "href"}
    assert targets <= set(ids)
    tips = json.loads(re.search(r'id="tips">(.*?)</script>', text, re.DOTALL)[1])
    marked = {value for _, name, value in parsed.attributes if name in ("data-tip", "data-row")}
    assert {f"run:{r.run_id}" for r in records} <= marked <= set(tips)

    with open(workdir / "results.csv") as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == sorted(
            (r.run_id for r in records), key=lambda i: (i.split("-")[0], "1e+13" in i, i)
        )
    assert json.loads((workdir / "fit.json").read_text())["baseline"] == "dense"


def test_a_hostile_arm_name_is_text_wherever_it_is_shown(make_sweep, make_workdir):
    arm = "</script><img src=x onerror='go()'>&amp;"
    records = [
        dataclasses.replace(r, run_id=f"run{i}")
        for i, r in enumerate(make_sweep(arms=("dense", arm), budgets=(1e12, 1e13), seeds=2))
    ]
    text = report(make_workdir(records)).read_text()
    assert "img" not in {tag for tag, _, _ in Page(text).attributes}
    arms = [row[0] for row in cells(section(text, "Seeds"))]
    assert sorted(arms) == sorted(["dense", arm] * 10)
    tips = json.loads(re.search(r'id="tips">(.*?)</script>', text, re.DOTALL)[1])
    assert any(tip.startswith(f"{arm} at 1e12 FLOPs: the optimum is") for tip in tips.values())


def test_a_folder_without_runs_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="holds no finished run"):
            report(folder)


def test_one_run_without_plan_spec_or_curve_gives_a_partial_report(make_record, make_workdir):
    record = make_record()
    workdir = make_workdir([record])
    (workdir / "plan.json").unlink()
    for name in ("spec.json", "metrics.jsonl"):
        (workdir / "runs" / record.run_id / name).unlink()
    text = report(workdir).read_text()
    assert record.run_id in text and "1 finished size;" in text and "no plan.json" in text


def test_seeds_of_one_cell_have_a_table(make_record, make_workdir):
    records = [make_record(run_id=f"s{s}", seed=s, eval_loss=2 + 0.1 * s) for s in range(3)]
    text = report(make_workdir(records)).read_text()
    table = text[text.index("<h3>Seeds</h3>") : text.index("<h2>Diverged")]
    assert cells(table) == [["dense", "1e12", "64", "200k", "3", "2.1000", "0.1000"]]


def test_a_sweep_whose_every_run_diverged_still_has_a_report(make_record, make_workdir):
    record = make_record(status="diverged", eval_loss=None, eval_loss_sem=None, diverged_step=9)
    text = report(make_workdir([record])).read_text()
    assert "diverged at step 9" in text


def cells(table):
    """Returns the text of every cell of a table, row by row."""
    rows = (re.findall(r"<td[^>]*>([^<\n]*)", row) for row in table.split("<tr")[2:])
    return [[html.unescape(cell) for cell in row] for row in rows]


def section(text, title):
    return re.split(r"<h[23]>", text[text.index(f">{title}</h") :])[0]


def test_a_spec_is_told_once_by_run_by_arm_or_for_all(make_sweep, make_workdir):
    records = make_sweep(budgets=(1e12,))
    workdir = make_workdir(records)
    for i, record in enumerate(records):
        routed = record.variant != "dense"
        layers = ["Dense()", "MoD(Dense())"] if routed else ["Dense()"]
        width = {"d_model": record.d_model, "d_ff": 4 * record.d_model}
        model = {**width, "layers": layers, "vocab": 259}
        train = {"warmup_steps": 20 if routed else 10 + i}
        spec = {"variant": record.variant, "model": model, "train": train}
        (workdir / "runs" / record.run_id / "spec.json").write_text(json.dumps(spec))
    text = report(workdir).read_text()
    assert cells(section(text, "The same in every run")) == [["model.vocab", "259"]]
    assert cells(section(text, "The same in every run of an arm")) == [
        ["dense", '["Dense()"]'],
        ["mod", '["Dense()", "MoD(Dense())"]'],
    ]
    runs = section(text, "Runs")
    heads = re.findall(r"<button>([^<]*)", runs)
    assert heads[-2:] == ["model.d_ff", "train.warmup_steps"] and "model.d_model" not in heads
    warmup = ["20" if r.variant == "mod" else str(10 + i) for i, r in enumerate(records)]
    assert [row[-1] for row in cells(runs)] == warmup
    assert [row[-2] for row in cells(runs)] == [str(4 * r.d_model) for r in records]


def test_a_cell_carries_what_to_sort_by_only_where_that_is_not_what_it_shows(
    make_record, make_workdir
):
    record = make_record(eval_loss=2.345678912, tokens=1_234_567)
    runs = section(report(make_workdir([record])).read_text(), "Runs")
    assert '<td data-key="2.345679">2.346' in runs
    assert "<td>1,234,567" in runs and "<td>1e12" in runs and "<td>0.003" in runs


def test_of_very_many_runs_the_page_tells_each_in_the_table_alone(
    make_sweep, make_workdir, monkeypatch
):
    records = make_sweep()
    monkeypatch.setattr(markers, "MANY", len(records) - 1)
    text = report(make_workdir(records)).read_text()
    assert [row[0] for row in cells(section(text, "Runs"))] == [r.run_id for r in records]
    assert "run:" not in text and "optimum:dense:1000000000000.0" in text


def test_runs_that_cannot_be_read_are_listed_with_their_reason(make_record, make_workdir):
    record = make_record()
    workdir = make_workdir([record])
    fits = fit_all([record], draws=50)
    text = render(workdir, [record], fits, {}, left_out={"dense-1e+12-not-run": "not <JSON>"})
    listed = section(text, "Diverged, refused and missing")
    assert "dense-1e+12-not-run is left out: not &lt;JSON&gt;." in listed
    assert "has no result" not in listed


def test_a_run_that_was_scored_on_other_data_is_set_aside_and_named(
    make_sweep, make_workdir, caplog
):
    records = make_sweep(arms=("dense",), budgets=(1e12,))
    other = dataclasses.replace(records[0], run_id="other-data", data_fingerprint="xyz")
    fewer = dataclasses.replace(records[1], run_id="fewer-tokens", eval_tokens=640)
    workdir = make_workdir([*records, other, fewer])
    found, fits = fit_workdir(workdir)
    assert fits == fit_all(records)
    assert {r.run_id for r in found.records} == {r.run_id for r in records}
    assert found.left_out == {
        "other-data": "other-data was scored on 65536 tokens of data xyz, and 5 other runs on "
        "65536 tokens of abc",
        "fewer-tokens": "fewer-tokens was scored on 640 tokens of data abc, and 5 other runs on "
        "65536 tokens of abc",
    }
    assert sum("left out: other-data was scored on" in message for message in caplog.messages) == 1
    listed = section(report(workdir).read_text(), "Diverged, refused and missing")
    assert "fewer-tokens is left out: fewer-tokens was scored on 640 tokens" in listed


def test_without_a_majority_nothing_is_set_aside(make_record, make_workdir):
    records = [make_record(run_id="a"), make_record(run_id="b", eval_tokens=640)]
    with pytest.raises(InputError, match="fit them apart"):
        fit_workdir(make_workdir(records))


DAMAGE = {
    "half": b'{"runs": ["a',
    "not UTF-8": b'{"command": "\xff", "runs": 7}',
    "deep": b'{"runs": ' + b"[" * 100_000,
    "deep enough to load": b'{"model": ' + b"[" * 400 + b"]" * 400 + b"}",
    "a list": b"[1, 2]",
    "other types": b'{"runs": [3], "config": 5, "model": 5, "train": [[]], "variant": {}}',
    "deeper types": b'{"runs": ["\\u0000"], "config": {"sweep": {"baseline": []}}, "x": Infinity}',
    "no text": b'{"command": "\\ud800", "variant": "\\ud800"}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_plan_or_spec_does_not_keep_the_report_away(damage, make_sweep, make_workdir):
    records = make_sweep(budgets=(1e12,), arms=("dense",))
    workdir = make_workdir(records)
    (workdir / "plan.json").write_bytes(damage)
    (workdir / "runs" / records[0].run_id / "spec.json").write_bytes(damage)
    text = report(workdir).read_text()
    assert all(r.run_id in text for r in records) and text.endswith("</html>\n")
