import dataclasses
import json

import numpy as np
import pytest

from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.report.figures import curves_figure
from modjax.scaling.report.learning_curves import Curve, frontier, read_curves
from modjax.scaling.report.page import report


def logged(losses, log_every, run_id="run"):
    """The curve of a run that had these losses, step by step, at 1e9 FLOPs a step."""
    steps = len(losses)
    ends = np.unique([1, *range(log_every, steps + 1, log_every), steps])
    starts = np.append(0, ends[:-1])
    means = [losses[a:b].mean() for a, b in zip(starts, ends, strict=True)]
    return Curve(run_id, "dense", steps, ends, ends - starts, ends * 1e9, np.array(means))


def noisy(steps, seed, sd=0.2):
    """Losses that fall from 5 towards 2, and the luck of every batch."""
    return (
        2
        + 3 / np.sqrt(np.arange(1, steps + 1))
        + sd * np.random.default_rng(seed).standard_normal(steps)
    )


def test_a_point_is_the_mean_over_a_twentieth_of_the_steps_that_end_there():
    losses = noisy(1000, 0)
    flops, loss = logged(losses, log_every=10).smooth
    ends = np.arange(50, 1001, 10)  # nothing before the first whole window
    np.testing.assert_array_equal(flops, ends * 1e9)
    np.testing.assert_allclose(loss, [losses[end - 50 : end].mean() for end in ends], rtol=1e-12)


@pytest.mark.parametrize("log_every", [7, 64])
def test_a_window_that_begins_within_a_line_takes_its_steps_at_their_mean(log_every):
    curve = logged(noisy(1000, 1), log_every)
    by_step = np.repeat(curve.loss, curve.loss_steps)
    ends = [end for end in curve.step if end >= 50]
    wanted = [by_step[end - 50 : end].mean() for end in ends]
    np.testing.assert_allclose(curve.smooth[1], wanted, rtol=1e-12)


def test_a_lucky_batch_does_not_move_the_frontier():
    losses = noisy(1000, 2)
    lucky = losses.copy()
    lucky[300] = 0.1
    others = [logged(noisy(1000, seed), 1) for seed in range(3, 6)]
    _, before = frontier([*others, logged(losses, 1)])
    _, after = frontier([*others, logged(lucky, 1)])
    assert np.abs(after - before).max() <= (losses[300] - 0.1) / 50
    assert after.min() > 2


def test_a_frontier_leans_low_by_no_more_than_the_noise_of_its_windows():
    runs = [logged(noisy(1000, seed), 1) for seed in range(40)]
    flops, least = frontier(runs)
    truth = np.minimum.accumulate(logged(noisy(1000, 0, sd=0), 1).smooth[1])
    np.testing.assert_array_equal(np.unique(flops), np.arange(50, 1001) * 1e9)
    lean = truth - np.interp(np.unique(flops), flops, least)
    assert lean.max() < 4.5 * 0.2 / np.sqrt(50)
    luckiest = np.minimum.accumulate(np.min([run.loss for run in runs], axis=0))[49:]
    assert (truth - luckiest).min() > 3 * lean.max(), "what the figure drew before"


def test_windows_of_few_steps_have_no_part_in_a_frontier():
    short, long = logged(noisy(980, 0), 10), logged(noisy(1000, 1), 10)
    assert frontier([short]) is None and frontier([]) is None
    np.testing.assert_array_equal(frontier([short, long]), frontier([long]))


def test_lines_are_read_past_damage_and_no_window_reaches_over_what_is_missing(
    make_record, make_workdir
):
    record = make_record(steps=1000)
    path = make_workdir([record]) / "runs" / record.run_id / "metrics.jsonl"
    (before,), lacking = read_curves(path.parents[2], [record])
    assert lacking == {}
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 22 and len(before.loss) == 21
    lines[5] = b"\xff\xfe" + lines[5][2:]  # the mean up to step 250
    lines[9] = b"[" * 100_000 + b"\n"  # up to 450
    lines[13] = json.dumps(json.loads(lines[13]) | {"loss": None}).encode() + b"\n"  # up to 650
    path.write_bytes(b"".join([*lines, b"7\n", b'{"step": 1' + b"0" * 400 + b"}\n", b'{"ste']))
    (after,), lacking = read_curves(path.parents[2], [record])
    # The line up to 650 is there: its mean was not finite.
    assert lacking == {
        record.run_id: "lacks steps 201 to 250, 401 to 450: metrics.jsonl has no lines of them"
    }
    kept = ~np.isin(before.step, [250, 450, 650])
    np.testing.assert_array_equal(after.loss, before.loss[kept])
    # The window is 50 steps, a line's: the points after a gap are whole again.
    ends = np.arange(50, 1001, 50)
    wanted = ends[~np.isin(ends, [250, 450, 650])]
    np.testing.assert_allclose(after.smooth[0], wanted / 1000 * record.train_flops)
    wider = dataclasses.replace(after, steps=2000)  # 100 steps: two lines
    assert not {250, 300, 450, 500, 650, 700} & set(wider.smooth[0] * 1000 / record.train_flops)


def test_a_curve_whose_file_or_end_is_lost_is_named(make_sweep, make_workdir):
    whole, cut, gone, folder, diverged = records = make_sweep(arms=("dense",), budgets=(1e12,))
    records[4] = diverged = dataclasses.replace(
        diverged, status="diverged", diverged_step=37, steps=37, eval_loss=None
    )
    workdir = make_workdir(records)
    metrics = {r.run_id: workdir / "runs" / r.run_id / "metrics.jsonl" for r in records}
    lines = metrics[cut.run_id].read_bytes().splitlines(keepends=True)
    metrics[cut.run_id].write_bytes(b"".join(lines[:10]))
    metrics[gone.run_id].unlink()
    metrics[folder.run_id].unlink()
    metrics[folder.run_id].mkdir()
    # A run that diverges logs no mean for the step in which it does, and ends.
    ends = [
        {"step": 30, "loss": 3.0, "loss_steps": 30, "train_flops": 1e9},
        {"step": 40, "loss": None, "loss_steps": 10, "train_flops": 2e9},
    ]
    metrics[diverged.run_id].write_text("".join(json.dumps(line) + "\n" for line in ends))
    curves, lacking = read_curves(workdir, records)
    assert [c.run_id for c in curves] == [whole.run_id, cut.run_id, diverged.run_id]
    assert lacking[cut.run_id].startswith("lacks steps 46 to 100: ")
    assert lacking[gone.run_id].startswith("lacks steps 1 to 100: ")
    assert lacking[folder.run_id].startswith("cannot be read: ")
    assert len(lacking) == 3
    text = report(workdir).read_text()
    for record in (cut, gone, folder):
        assert f"The learning curve of {record.run_id} {lacking[record.run_id][:20]}" in text


def test_losses_of_single_steps_are_not_drawn(make_record, make_workdir):
    record = make_record()
    path = make_workdir([record]) / "runs" / record.run_id / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("loss_steps", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves, _ = read_curves(path.parents[2], [record])
    assert curves == [] and curves_figure(curves, fit_all([record], draws=50)) is None
