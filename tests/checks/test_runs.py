"""Checks of runs: before they start, and when their data or folder changes meanwhile."""

import dataclasses
import shutil

import pytest

from modjax.checks.look_ahead import Finding, Leak
from modjax.checks.runs import check
from modjax.data.token_cache import cache_dir, open_cache
from modjax.errors import InputError, SharedFault
from modjax.records import read_record, scan, write_record
from modjax.specs import Dense, Execution
from modjax.training.loop import train
from modjax.training.results.clock import Clock
from modjax.training.results.run_record import make_record
from tests.conftest import TINY_DATA
from tests.outside.strided import Strided
from tests.training.tiny import run_spec

ONE_DEVICE = Execution(data=1, log_every=1)


@pytest.mark.parametrize(
    ("changes", "execution", "message"),
    [
        ({"eval_sequences": 10**6}, {}, "train.eval_sequences = 1000000: the validation split"),
        ({"batch_size": 12}, {"data": 8}, "train.batch_size = 12: must be a multiple of 8"),
        ({}, {"data": 9}, "execution.data = 9: needs 9 devices"),
        ({}, {"fsdp": 3}, "execution.fsdp * tensor * expert = 3: must divide"),
        ({"d_ff": 33}, {"tensor": 2}, "execution.tensor = 2: must divide 33, the mlp dimension"),
        ({"vocab_size": 200}, {}, "model.vocab_size = 200: must be at least 259"),
        ({"steps": 10**6}, {}, "data.max_epochs = 1.0: this run reads tiny"),
    ],
)
def test_the_check_finds_what_a_run_of_many_would_be_refused_for(
    tiny_data_dir, changes, execution, message
):
    where = {"data_dir": tiny_data_dir, "fingerprint": None}
    good, bad = run_spec(), run_spec(**changes)
    check([good], Execution(), **where)
    with pytest.raises(InputError) as caught:
        check([good, bad], Execution(**execution), **where)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_layer_is_probed_before_training_and_what_was_found_is_kept_for_modjax_s_own(
    tiny_data_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probed = []

    def finds(model, length):
        probed.append(str(model.layers[-1]))
        leak = Leak(5, 4, 0.25) if "Strided" in probed[-1] else None
        return [Finding(probed[-1], "router", True, leak)]

    monkeypatch.setattr("modjax.checks.runs.probe", finds)
    own, outside = run_spec(layers="Dense(), MoD(Dense())"), run_spec(layers=(Strided(Dense()),))
    where = {"data_dir": tiny_data_dir, "fingerprint": None}
    for _ in range(2):
        check([own], ONE_DEVICE, **where)
    assert probed == ["Dense()", "MoD(Dense())"]
    for path in tmp_path.rglob("*.json"):
        path.write_text("[[1]]")  # damaged: it is probed again
    check([own], ONE_DEVICE, **where)
    assert probed == 2 * ["Dense()", "MoD(Dense())"]
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"Strided\(Dense\(\)\)'.*position 5 moves position 4 by 25"
        ):
            check([own, outside], ONE_DEVICE, **where)
    assert probed[4:] == 2 * ["Strided(Dense())"]


def test_a_run_refuses_other_data_than_its_plan_was_made_for(tiny_data_dir, tmp_path):
    with pytest.raises(SharedFault, match="anew"):
        check([run_spec()], ONE_DEVICE, data_dir=tiny_data_dir, fingerprint="another")
    with pytest.raises(SharedFault, match="anew"):
        train(
            run_spec(),
            ONE_DEVICE,
            run_dir=tmp_path / "run",
            data_dir=tiny_data_dir,
            fingerprint="another",
        )
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_is_replaced_meanwhile_leaves_no_result(tiny_data_dir, tmp_path):
    shutil.copytree(tiny_data_dir, tmp_path / "data")
    manifest = cache_dir(tmp_path / "data", TINY_DATA) / "manifest.json"

    def replace(line):
        manifest.write_text(manifest.read_text().replace("tiny-1", "tiny-2"))

    with pytest.raises(SharedFault, match="anew"):
        train(
            run_spec(),
            ONE_DEVICE,
            run_dir=tmp_path / "run",
            data_dir=tmp_path / "data",
            progress=replace,
        )
    assert read_record(tmp_path / "run") is None


def test_a_run_whose_folder_is_moved_says_so_makes_no_new_one_and_goes_on_when_it_is_back(
    tiny_data_dir, tmp_path
):
    def move(line):
        if line["step"] == 5:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(SharedFault, match="moved or deleted in the middle of a run"):
        train(
            run_spec(), ONE_DEVICE, run_dir=tmp_path / "run", data_dir=tiny_data_dir, progress=move
        )
    assert not (tmp_path / "run").exists()
    (tmp_path / "moved").rename(tmp_path / "run")
    record = train(run_spec(), ONE_DEVICE, run_dir=tmp_path / "run", data_dir=tiny_data_dir)
    assert record.status == "finished"


def test_a_causal_loss_that_is_not_finite_leaves_a_record_that_can_be_read(tiny_data_dir, tmp_path):
    spec = run_spec()
    found = {
        "eval_loss": 2.0,
        "eval_loss_sem": float("inf"),
        "causal_loss": float("nan"),
        "causal_difference": float("inf"),
        "causal_difference_sem": float("nan"),
        "outcome": {"causal/accuracy": 0.5, "causal/most": float("nan")},
    }
    record = make_record(
        spec,
        open_cache(cache_dir(tiny_data_dir, TINY_DATA)),
        Clock(),
        diverged_step=0,
        train_loss=2.0,
        found=found,
        device="cpu",
        eval_batch_size=8,
        provenance={"devices": "1"},
    )
    folder = tmp_path / "runs" / spec.run_id
    folder.mkdir(parents=True)
    write_record(folder, record)
    scanned = scan(tmp_path)
    assert scanned.left_out == {} and scanned.records == [record]
    assert (
        record.eval_loss == 2.0
        and record.eval_loss_sem is None
        and record.outcome
        == {
            "causal/accuracy": 0.5,
            "causal/most": None,
        }
    )
    assert record.causal_loss is record.causal_difference is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(folder, dataclasses.replace(record, eval_loss=float("nan")))
