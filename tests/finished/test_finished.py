"""Finished runs, opened again and compared with themselves under causal routing.

Legend: B sequences, L positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.data.batches import eval_batches
from modjax.errors import InputError
from modjax.finished.runs import choose, compare, open_run
from modjax.records import read_records, run_dir, write_record, write_spec
from modjax.specs import Dense
from tests.nn.small import QUICK


@pytest.fixture(scope="module")
def run(finished_workdir, tiny_data_dir):
    (spec,), _ = choose(finished_workdir, None)
    return open_run(spec, workdir=finished_workdir, data_dir=tiny_data_dir)


@pytest.fixture(scope="module")
def compared(run):
    """Returns comparisons by slack: with slots for every position, and with the fewest possible."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield {slack: compare(run, "predictor", slack) for slack in (None, 1e-9)}
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def expected(run):
    """Returns the loss and masks of every position by routing, from one forward pass and NumPy."""
    train = run.spec.train
    (batch,) = eval_batches(
        run.cache,
        seq_len=train.seq_len,
        batch_size=train.eval_sequences,
        sequences=train.eval_sequences,
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def forward(weights, tokens_BL):
        model = nnx.merge(run.model.graphdef, weights)
        return {
            "trained": model(tokens_BL),
            "predictor": model(tokens_BL, routing="predictor"),
            "bounded": model(tokens_BL, routing="predictor", slack=1e-9),
        }

    weights = jax.device_get(run.weights)
    found = jax.device_get(forward(weights, jnp.asarray(batch.inputs_BL)))
    # A router whose scores are 0 adds nothing: the layer is passed by.
    router = weights["stack"]["blocks"]["1_mod"]["router"]
    router["w"] = np.zeros_like(router["w"])
    found["bypassed"] = jax.device_get(forward(weights, jnp.asarray(batch.inputs_BL)))["trained"]
    return {
        name: (numpy_loss(logits_BLV, batch.targets_BL), records["1_mod"], records["1_mod/causal"])
        for name, (logits_BLV, records) in found.items()
    }


def numpy_loss(logits_BLV, targets_BL):
    x = np.float64(logits_BLV)
    x -= x.max(axis=2, keepdims=True)
    picked_BL = np.take_along_axis(x, targets_BL[..., None], axis=2)[..., 0]
    return np.log(np.exp(x).sum(axis=2)) - picked_BL


def test_the_loss_as_trained_is_the_records(finished_workdir, compared):
    (record,) = read_records(finished_workdir)
    for comparison in compared.values():
        assert comparison.trained.loss == pytest.approx(record.eval_loss, rel=1e-6)
        assert comparison.trained.tokens == record.eval_tokens
    assert compared[None].causal.loss == pytest.approx(record.causal_loss, rel=1e-6)


def test_losses_and_the_paired_error_are_numpys(compared, expected):
    found = compared[None]
    (trained_BL, *_), (causal_BL, *_) = expected["trained"], expected["predictor"]
    assert found.trained.loss == pytest.approx(trained_BL.mean(), rel=1e-5)
    assert found.causal.loss == pytest.approx(causal_BL.mean(), rel=1e-5)
    difference_B = (causal_BL - trained_BL).mean(axis=1)
    assert found.difference.loss == pytest.approx(difference_B.mean(), abs=1e-6)
    sem = np.std(difference_B, ddof=1) / np.sqrt(len(difference_B))
    assert found.difference.sem == pytest.approx(sem, rel=1e-3)
    assert sem < found.causal.sem, "pairing helps"


def test_what_a_layer_decided_is_counted_as_numpy_does(compared, expected):
    _, record, taught = expected["predictor"]
    wanted, target = taught.logits_BL[0] > 0, record.target_BL[0]
    assert 0 < wanted.mean() < 1
    (name, found), *others = compared[None].layers.items()
    assert (name, others) == ("1_mod.0", [])
    assert found["accuracy"] == pytest.approx((wanted == target).mean())
    assert found["precision"] == pytest.approx((wanted & target).sum() / wanted.sum())
    assert found["recall"] == pytest.approx((wanted & target).sum() / target.sum())
    assert found["capacity"] == pytest.approx(wanted.mean())
    assert found["most"] == pytest.approx(wanted.mean(axis=1).max())
    assert found["overflow"] == 0


def test_without_room_the_layer_is_passed_by_and_the_overflow_is_counted(compared, expected):
    found = compared[1e-9]
    bypassed_BL, *_ = expected["bypassed"]
    bounded_BL, _, taught = expected["bounded"]
    wanted = taught.logits_BL[0] > 0
    first = wanted & (np.cumsum(wanted, axis=1) == 1)  # there is room for one
    loss = np.where(first, bounded_BL, bypassed_BL).mean()
    assert found.causal.loss == pytest.approx(loss, rel=1e-6)
    assert abs(found.causal.loss - compared[None].causal.loss) > 1e-4
    layer = found.layers["1_mod.0"]
    assert layer["capacity"] == pytest.approx(first.mean())
    assert layer["overflow"] == pytest.approx((wanted & ~first).mean())


def test_runs_are_chosen_by_name_and_by_having_a_router(finished_workdir):
    (spec,), _ = choose(finished_workdir, None, routed=True)
    assert choose(finished_workdir, spec.run_id) == ([spec], {})
    with pytest.raises(InputError, match=rf"--run = 'x': must be one of 1 .* {spec.run_id}$"):
        choose(finished_workdir, "x")


def add_run(workdir, record, spec, **changes):
    """Adds a run without a checkpoint, whose record is `record` with `changes`."""
    folder = run_dir(workdir, spec.run_id)
    folder.mkdir(parents=True)
    write_spec(folder, spec)
    write_record(folder, dataclasses.replace(record, run_id=spec.run_id, **changes))


def test_folders_without_a_fitting_run_are_refused(finished_workdir, run, tmp_path):
    (record,) = read_records(finished_workdir)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"--workdir = .*: holds no finished run$"):
            choose(path, None)
    add_run(tmp_path, record, run.spec, status="diverged")
    with pytest.raises(InputError, match=r"holds no finished run$"):
        choose(tmp_path, None)
    dense = dataclasses.replace(run.spec.model, layers=(Dense(),))
    add_run(tmp_path, record, dataclasses.replace(run.spec, model=dense))
    assert len(choose(tmp_path, None).specs) == 1
    with pytest.raises(InputError, match=r"holds no finished run with a routed layer$"):
        choose(tmp_path, None, routed=True)


def test_a_run_without_its_checkpoint_or_its_data_is_refused_and_nothing_is_made(
    finished_workdir, run, tiny_data_dir, tmp_path
):
    (record,) = read_records(finished_workdir)
    add_run(tmp_path, record, run.spec)
    with pytest.raises(InputError, match=rf"{run.spec.run_id}/checkpoints/30.*final weights"):
        open_run(run.spec, workdir=tmp_path, data_dir=tiny_data_dir)
    with pytest.raises(InputError, match="modjax data prepare"):
        open_run(run.spec, workdir=finished_workdir, data_dir=tmp_path)
    made = {path.name for path in run_dir(tmp_path, run.spec.run_id).iterdir()}
    assert made == {"spec.json", "result.json"}
