"""The metrics file, its lines after a restart, and TensorBoard."""

import json
import sys

import numpy as np
import pytest

from modjax.errors import InputError
from modjax.training.results.metrics import MetricsWriter, last_train_loss, require_tensorboard


def write(run_dir, start, lines):
    writer = MetricsWriter(run_dir, start_step=start, tensorboard=False)
    for step, values in lines:
        writer.write(step, values)
    writer.sync()
    writer.close()
    return (run_dir / "metrics.jsonl").read_bytes()


LINES = [
    (1, {"loss": np.float32(3.3), "loss_steps": 1}),
    (2, {"loss": np.float32(2.2), "loss_steps": 1}),
    (2, {"eval_loss": 2.5}),
    (4, {"loss": np.float32(1.1), "loss_steps": 2}),
    (4, {"eval_loss": 1.5}),
]


@pytest.mark.parametrize(("restored", "kept"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_a_resumed_run_repeats_no_line_and_ends_in_the_same_bytes(tmp_path, restored, kept):
    whole = write(tmp_path, 0, LINES)
    assert write(tmp_path, restored, []) == b"".join(whole.splitlines(keepends=True)[:kept])
    assert write(tmp_path, restored, LINES[kept:]) == whole


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\n"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, tail):
    whole = write(tmp_path, 0, LINES[:2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert write(tmp_path, 9, []) == whole


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"[" * 100_000, b"3", b"[1]", b'{"loss": 1}', b'{"step": "x"}']
)
def test_one_damaged_line_is_said_and_hides_no_line_after_it(tmp_path, damage, caplog):
    lines = write(tmp_path, 0, LINES).splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], damage + b"\n", *lines[2:]]))
    assert write(tmp_path, 9, []) == b"".join([lines[0], *lines[2:]])
    damaged, lost = caplog.messages
    assert "metrics.jsonl: line 2 is damaged: left out" in damaged
    assert "metrics.jsonl: has lost its lines of steps 2, 5 to 9: " in lost
    assert last_train_loss(tmp_path) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("kept", "restored", "unlogged", "lost"),
    [
        ([0, 1, 2, 3, 4], 4, 0, None),
        ([0, 1, 2, 3], 5, 1, None),  # the state holds the loss of step 5, and no line does yet
        ([0, 1], 4, 0, "3 to 4"),
        ([0, 1], 5, 1, "3 to 4"),
        ([0, 3], 4, 0, "2"),
        ([3], 4, 0, "1 to 2"),
        ([2, 4], 4, 0, "1 to 4"),  # evaluations are no training lines
        ([], 4, 0, "1 to 4"),
        ([], 0, 0, None),
    ],
)
def test_steps_whose_lines_are_lost_before_the_checkpoint_are_named(
    tmp_path, caplog, kept, restored, unlogged, lost
):
    lines = write(tmp_path, 0, LINES).splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[i] for i in kept))
    MetricsWriter(tmp_path, start_step=restored, unlogged=unlogged, tensorboard=False).close()
    said = [f"has lost its lines of steps {lost}: the run goes on from step {restored}"] * bool(
        lost
    )
    assert len(caplog.messages) == len(said)
    assert all(words in message for words, message in zip(said, caplog.messages, strict=True))


def test_bytes_that_are_not_utf8_at_the_end_do_not_fail_a_restart(tmp_path):
    whole = write(tmp_path, 0, LINES[:2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "\xff')
    assert last_train_loss(tmp_path) == pytest.approx(2.2)
    assert write(tmp_path, 9, []) == whole


def test_values_that_are_not_finite_are_null_and_floats_keep_their_value(tmp_path):
    third = np.float32(1) / np.float32(3)
    text = write(tmp_path, 0, [(1, {"a": np.float32(np.nan), "b": third, "c": 1 / 3, "d": 2**53})])
    line = json.loads(text)
    assert line["a"] is None
    assert np.float32(line["b"]) == pytest.approx(third, rel=1e-6)
    assert (line["c"], line["d"]) == (1 / 3, 2**53)


def test_last_train_loss_skips_evaluations(tmp_path):
    assert last_train_loss(tmp_path) is None
    write(tmp_path, 0, LINES)
    assert last_train_loss(tmp_path) == pytest.approx(1.1)


def test_tensorboard_without_its_package_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"execution.tensorboard = True: .*\[tensorboard\]"):
        require_tensorboard()


def test_tensorboard_gets_every_value_without_tensorflow(tmp_path):
    pytest.importorskip("tensorboardX")
    before = "tensorflow" in sys.modules
    writer = MetricsWriter(tmp_path, start_step=0, tensorboard=True)
    writer.write(1, {"loss": np.float32(2.0)})
    writer.sync()
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert ("tensorflow" in sys.modules) == before
