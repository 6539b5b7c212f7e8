"""Tables of records."""

import csv
import dataclasses

import pytest

from modjax.errors import InputError
from modjax.records import RunRecord, read_csv, write_csv

FINISHED = RunRecord(
    run_id="moe-1e11-d8-l4-00ff00ff",
    variant="moe",
    status="finished",
    diverged_step=None,
    budget_flops=1e11,
    train_flops=99876543210.0,
    forward_flops_per_token=1 / 3,
    flops={"mlp": 2.5, "router": 0.0},
    params_total=70,
    params_non_embedding=60,
    params_active=50,
    d_model=8,
    num_layers=4,
    tokens=10**12,
    epochs=0.1,
    steps=7,
    batch_size=4,
    seq_len=128,
    learning_rate=1e-3,
    train_loss=None,
    eval_loss=2.123456789012345,
    eval_loss_sem=0.01,
    eval_bits_per_byte=3.0,
    eval_tokens=65536,
    seed=0,
    data_seed=0,
    data_fingerprint="123",
    code_version="0.1.0+1234567",
    wall_seconds=1.0,
    train_seconds=1.0,
    compile_seconds=0.0,
    eval_seconds=0.5,
    data_wait_seconds=0.0,
    median_step_seconds=1e-5,
    device='1 x "cpu", small',
    versions={"jax": "0.10.2"},
    causal_routing="predictor",
    causal_loss=2.0,
    outcome={"trained/moe/dropped": 0.125},
)
DIVERGED = dataclasses.replace(
    FINISHED, status="diverged", diverged_step=3, eval_loss=None, causal_routing=None
)


def test_a_table_gives_back_its_records(tmp_path):
    table = tmp_path / "runs.csv"
    write_csv(table, [FINISHED, DIVERGED])
    assert read_csv(table) == [FINISHED, DIVERGED]


def test_a_table_without_the_newest_columns_is_read(tmp_path):
    table = tmp_path / "runs.csv"
    write_csv(table, [FINISHED])
    with open(table, newline="", encoding="utf-8") as file:
        names, row = csv.reader(file)
    first = names.index("causal_routing")
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names[:first], row[:first]])
    assert read_csv(table) == [
        dataclasses.replace(FINISHED, causal_routing=None, causal_loss=None, outcome={})
    ]


def test_an_earlier_table_has_columns_of_its_own_for_an_outcome(tmp_path):
    table = tmp_path / "runs.csv"
    write_csv(table, [FINISHED])
    with open(table, newline="", encoding="utf-8") as file:
        names, row = csv.reader(file)
    at, earlier = names.index("outcome"), {"moe_dropped": "0.125", "causal_accuracy": ""}
    names[at : at + 1], row[at : at + 1] = earlier, earlier.values()
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, row])
    assert read_csv(table) == [FINISHED]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("2.123456789012345", "low", "eval_loss"),
        (",70,", ",,", "params_total"),
        ("variant", "arm", "arm"),
    ],
)
def test_a_row_that_is_no_record_is_refused(tmp_path, old, new, field):
    table = tmp_path / "runs.csv"
    write_csv(table, [FINISHED])
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=field):
        read_csv(table)
