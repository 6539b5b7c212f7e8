import csv
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from modjax.config import InputError
from modjax.scaling.report import report


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
    assert re.findall(r"<td[^>]*>([^<]*)", table) == [
        "dense", "1e12", "64", "200k", "3", "2.1000", "0.1000",
    ]  # fmt: skip


def test_a_sweep_whose_every_run_diverged_still_has_a_report(make_record, make_workdir):
    record = make_record(status="diverged", eval_loss=None, eval_loss_sem=None, diverged_step=9)
    text = report(make_workdir([record])).read_text()
    assert "diverged at step 9" in text
