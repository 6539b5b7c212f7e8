"""Whole runs: kills of real processes, divergence, records, and input that is refused."""

import dataclasses
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from modjax.errors import InputError
from modjax.records import read_record, write_spec
from modjax.specs import Execution
from modjax.training.loop import train
from tests.training.killed import ONE_DEVICE, assert_same_end, wait_for
from tests.training.tiny import run_spec

# Forward FLOPs of a sequence of `run_spec`, by hand: d 16, d_ff 32, vocabulary 260; the dense block
# takes all 32 tokens, the routed one 8.
FORWARD = (
    2 * (32 + 8) * (4 * 16 * 16 + 2 * 16 * 32)  # q, k, v, output; MLP
    + 2 * 2 * (32 * 32 + 8 * 8) * 16  # scores, values
    + 2 * 32 * 16 * (1 + 260)  # router, logits
)


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_sigkill_at_any_moment_ends_in_identical_bytes(start, undisturbed, tmp_path):
    rng = random.Random(0)
    for step in (1, 18, 40):
        process = start(tmp_path)
        wait_for(process, step)
        time.sleep(rng.uniform(0, 0.06))  # in a step, a save, or between
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "result.json").exists()
    process = start(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    first = int(output.split()[1])
    assert first > 14, "must go on from a checkpoint"
    assert_same_end(tmp_path, undisturbed)
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 2


def test_sigterm_saves_and_a_damaged_checkpoint_is_set_aside(start, undisturbed, tmp_path):
    process = start(tmp_path)
    wait_for(process, 20)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 75
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert newest >= 20

    stored = [
        path for path in (tmp_path / "checkpoints" / str(newest)).rglob("*") if path.is_file()
    ]
    largest = max(stored, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    process = start(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    (message,) = errors.strip().splitlines()
    assert f"checkpoint {newest} is damaged" in message
    assert (tmp_path / "checkpoints" / f"damaged-{newest}").is_dir()
    # Even steps tell of themselves: after a checkpoint of 20, beside a damaged one of 21, 22 does.
    assert 1 < int(output.split()[1]) <= newest + newest % 2
    assert_same_end(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def finished(tiny_data_dir, tmp_path_factory):
    """A short run with a routed model, on 4 devices, and its record."""
    run_dir = tmp_path_factory.mktemp("finished")
    lines = []
    record = train(
        run_spec(),
        Execution(log_every=5, data=2, fsdp=2),
        run_dir=run_dir,
        data_dir=tiny_data_dir,
        progress=lines.append,
    )
    return run_dir, record, lines


def test_the_record_says_what_was_spent(finished):
    run_dir, record, _ = finished
    spec = run_spec()
    assert record == read_record(run_dir)
    assert (record.status, record.diverged_step, record.steps) == ("finished", None, 12)
    assert record.tokens == 12 * 8 * 32
    assert record.train_flops == 3 * FORWARD * 12 * 8
    assert record.eval_tokens == spec.train.eval_sequences * 32
    assert 0 < record.eval_loss_sem < record.eval_loss < np.log(260) + 1
    assert 0 < record.epochs < 1
    parts = record.train_seconds + record.compile_seconds + record.eval_seconds
    assert 0.5 * record.wall_seconds < parts <= record.wall_seconds
    assert 0 < record.median_step_seconds <= record.train_seconds
    assert record.device == "4 x cpu"


def test_lines_tell_loss_rate_flops_and_routing_of_logged_steps(finished):
    run_dir, record, lines = finished
    assert lines == metrics_of(run_dir)
    assert [line["step"] for line in lines] == [1, 5, 10, 12, 12]
    for line in lines[:-1]:
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["train_flops"] == 3 * FORWARD * line["step"] * 8
        assert line["grad_norm"] > 0 and 0 <= line["router/chosen_by_all"] <= 1
    assert lines[-2]["learning_rate"] == pytest.approx(0.1 * run_spec().train.learning_rate)
    assert lines[-1]["eval_loss"] == record.eval_loss
    assert record.train_loss == lines[-2]["loss"]


def test_a_line_tells_the_mean_loss_of_all_steps_since_the_line_before(
    finished, tiny_data_dir, tmp_path
):
    _, record, lines = finished
    every_step = Execution(log_every=1, data=2, fsdp=2)
    train(run_spec(), every_step, run_dir=tmp_path, data_dir=tiny_data_dir)
    single = np.array([line["loss"] for line in metrics_of(tmp_path) if "loss" in line])
    assert len(single) == record.steps and np.std(single) > 0.01
    start = 0
    for line in (line for line in lines if "loss" in line):
        assert line["loss_steps"] == line["step"] - start
        assert line["loss"] == pytest.approx(single[start : line["step"]].mean(), rel=1e-5)
        start = line["step"]


class Stop(Exception):
    pass


def test_a_run_goes_on_in_another_mesh(finished, tiny_data_dir, tmp_path):
    _, record, lines = finished
    where = {"run_dir": tmp_path, "data_dir": tiny_data_dir}

    def stop(line):
        if line["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        first = Execution(data=4, log_every=2, checkpoint_seconds=1e-9)
        train(run_spec(), first, progress=stop, **where)
    later = []
    second = Execution(data=2, fsdp=2, log_every=5)
    again = train(run_spec(), second, progress=later.append, **where)
    assert later[0]["step"] > 5, "must go on from a checkpoint"
    assert again.eval_loss == pytest.approx(record.eval_loss, rel=1e-4)
    assert later[-1]["eval_loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-4)
    assert again.provenance["mesh"] == "data 4 then data 2, fsdp 2"


def test_a_finished_run_is_not_trained_again(finished, tmp_path):
    run_dir, record, _ = finished
    assert train(run_spec(), ONE_DEVICE, run_dir=run_dir, data_dir=tmp_path / "gone") == record


def test_divergence_is_recorded_with_its_step_whenever_it_is_noticed(tiny_data_dir, tmp_path):
    def diverge(log_every):
        spec = run_spec(learning_rate=1e19, warmup_steps=0, steps=40)
        run_dir = tmp_path / str(log_every)
        record = train(
            spec, Execution(data=1, log_every=log_every), run_dir=run_dir, data_dir=tiny_data_dir
        )
        return record, metrics_of(run_dir)

    record, lines = diverge(1)
    broken = [line["loss"] is None or line["grad_norm"] is None for line in lines]
    assert broken == [False] * (len(lines) - 1) + [True]
    assert record.status == "diverged" and record.eval_loss is None
    assert record.diverged_step == record.steps == lines[-1]["step"]
    assert record.train_flops == lines[-1]["train_flops"]
    assert diverge(16)[0].diverged_step == record.diverged_step


def refusal(spec, execution, run_dir, data_dir) -> str:
    with pytest.raises(InputError) as caught:
        train(spec, execution, run_dir=run_dir, data_dir=data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "execution", "named"),
    [
        ({"vocab_size": 100}, ONE_DEVICE, "model.vocab_size = 100"),
        ({"steps": 5000}, ONE_DEVICE, "data.max_epochs"),
        ({"eval_sequences": 10**6}, ONE_DEVICE, "train.eval_sequences"),
        ({"batch_size": 6}, Execution(), "train.batch_size = 6"),
        ({"num_heads": 1, "num_kv_heads": 1}, Execution(tensor=2), "execution.tensor = 2"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_written(
    tiny_data_dir, tmp_path, changes, execution, named
):
    message = refusal(run_spec(**changes), execution, tmp_path / "run", tiny_data_dir)
    assert named in message
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(tiny_data_dir, tmp_path):
    other = run_spec(seed=1)
    write_spec(tmp_path, other)
    message = refusal(run_spec(), ONE_DEVICE, tmp_path, tiny_data_dir)
    assert other.run_id in message and run_spec().run_id in message


def test_checkpoints_of_another_run_are_refused(finished, tiny_data_dir, tmp_path):
    (tmp_path / "checkpoints").symlink_to(finished[0] / "checkpoints")
    message = refusal(run_spec(seed=1), Execution(data=2, fsdp=2), tmp_path, tiny_data_dir)
    assert "run_id" in message
    assert dataclasses.asdict(finished[1])["run_id"] in message
