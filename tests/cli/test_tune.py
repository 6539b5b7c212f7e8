"""`modjax tune`: routers of layers around a pretrained model, trained and kept in a file."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

pytest.importorskip("safetensors", reason="the extra `pretrained`")

from safetensors.numpy import load_file

from modjax import from_pretrained
from modjax.data.batches import eval_batches, train_batch
from modjax.data.token_cache import cache_dir, open_cache
from modjax.finished.calibration import calibrated
from modjax.finished.runs import load as load_run
from modjax.nn.routing.skipping import Skipped
from modjax.records import read_records, run_dir
from modjax.scaling.plan.experiment import load
from modjax.specs import Execution
from modjax.training.loop import train
from tests.conftest import TINY_DATA
from tests.pretrained.models.numpy_decoder import decode
from tests.pretrained.models.small_models import Case, write
from tests.training.tiny import QUICK

ONE = Execution(data=1)
CONFIG = """
import ml_collections
from modjax import Seq, Skip
from modjax.pretrained import model_fields

def get_config(path):
    config = ml_collections.ConfigDict()
    skip = lambda block: Seq(Skip(block.parts[0], capacity=0.5), block.parts[1])
    config.model = model_fields(path, lambda i, block: skip(block) if i else block)
    steps = {"steps": 3, "learning_rate": 3e-3, "warmup_steps": 1, "trained": "routers"}
    config.train = {"batch_size": 2, "seq_len": 32, "eval_sequences": 8, **steps}
    config.data = {"name": "tiny"}
    config.execution = {"data": 1}
    config.base = path
    return config
"""


@pytest.fixture(scope="module")
def arguments(tiny_data_dir, tmp_path_factory):
    """Returns the arguments of `modjax tune` for a small model, without --workdir."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "config.py").write_text(CONFIG)
    (folder / "llama").mkdir()
    write(folder / "llama", Case("llama", changes={"vocab_size": 272, "num_hidden_layers": 2}))
    where = [f"--pretrained={folder / 'llama'}", f"--config={folder / 'config.py'}"]
    return ["tune", *where, f"--data-dir={tiny_data_dir}"]


@pytest.fixture(scope="module")
def trained(arguments, quick_compiles, tiny_data_dir, tmp_path_factory):
    """Returns a folder with the finished run, without its file of routers."""
    workdir = tmp_path_factory.mktemp("trained")
    config, base = (arguments[i].partition("=")[2] for i in (2, 1))
    (spec,) = load(f"{config}:{base}").specs
    train(spec, ONE, run_dir=run_dir(workdir, spec.run_id), data_dir=tiny_data_dir)
    return workdir


def run_of(workdir):
    (record,) = read_records(workdir)
    return run_dir(workdir, record.run_id)


def test_a_finished_run_writes_its_routers(arguments, trained, tmp_path, tiny_data_dir, said):
    workdir = shutil.copytree(trained, tmp_path / "work")
    code, out, err = said(*arguments, f"--workdir={workdir}")
    assert code == 0, err
    run, file = load_run(run_of(workdir)), run_of(workdir) / "routers.safetensors"
    content = file.read_bytes()
    assert "new weights, not in" in err and "router.w" in err
    assert out.splitlines()[-1] == f"{file} ({len(content) / 1000:.3g}kB)"
    assert len(content) < 10_000

    found = from_pretrained(arguments[1].partition("=")[2], routers=file)
    assert (found.spec, found.graphdef) == (run.spec.model, run.graphdef)
    tokens = np.random.default_rng(0).integers(3, 259, (2, 24))

    def forward(weights):
        return nnx.merge(run.graphdef, weights)(tokens, routing="causal")[0]

    logits = jax.jit(forward, compiler_options=QUICK)
    weights = calibrated(run, tiny_data_dir)
    ours, theirs = (np.asarray(logits(one)) for one in (weights, found.weights))
    assert ours.tobytes() == theirs.tobytes() and np.isfinite(ours).all()
    # Nothing but the thresholds and means has moved, and the capacity is met on other text.
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(run.weights), jax.tree.leaves(weights), strict=True
    )
    moved = {path[-1].key for (path, old), new in pairs if not np.array_equal(old, new)}
    assert moved == {"threshold", "mean"}
    cache = open_cache(cache_dir(tiny_data_dir, TINY_DATA))
    windows = train_batch(cache, seq_len=32, batch_size=64, seed=5, step=3).inputs_BL
    shown = jax.jit(lambda w: nnx.merge(run.graphdef, w)(windows)[1], compiler_options=QUICK)
    (record,) = (r for r in shown(weights).values() if isinstance(r, Skipped))
    assert np.mean(record.selected_BL) == pytest.approx(0.5, abs=0.04)

    file.unlink()
    assert said(*arguments, f"--workdir={workdir}", "--json")[0] == 0
    assert file.read_bytes() == content


def nats_BL(folder, tensors, batch):
    """Returns the loss of every position by the decoder in numpy."""
    config = json.loads((folder / "config.json").read_text())
    logs_BLV = log_softmax(decode(config, tensors, batch.inputs_BL), axis=-1)
    return -np.take_along_axis(logs_BLV, batch.targets_BL[..., None], axis=-1)[..., 0]


def test_each_part_is_dropped_alone(arguments, tiny_data_dir, quick_compiles, said):
    code, out, err = said(*arguments, "--measure-layers", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert sorted(found, key=lambda one: one["increase"]) == found and len(found) == 6
    folder = Path(arguments[1].partition("=")[2])
    tensors = load_file(folder / "model.safetensors")
    cache = open_cache(cache_dir(tiny_data_dir, TINY_DATA))
    (batch,) = eval_batches(cache, seq_len=32, batch_size=8, sequences=8)
    whole_BL = nats_BL(folder, tensors, batch)
    outputs = {"attention": ["self_attn.o_proj"], "mlp": ["mlp.down_proj"]}
    outputs["block"] = outputs["attention"] + outputs["mlp"]
    for one in found:
        names = [f"model.layers.{one['layer']}.{name}.weight" for name in outputs[one["part"]]]
        zeros = {name: np.zeros_like(tensors[name]) for name in names}
        loss_BL = nats_BL(folder, tensors | zeros, batch)
        assert one["loss"] == pytest.approx(loss_BL.mean(), abs=1e-5)
        gap_B = np.mean(loss_BL - whole_BL, axis=1)
        assert one["increase"] == pytest.approx(gap_B.mean(), abs=1e-5)
        assert one["sem"] == pytest.approx(np.std(gap_B, ddof=1) / np.sqrt(8), rel=1e-3)


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_file(arguments, tmp_path, modjax):
    long = (*arguments, "--config.train.steps=1500", "--config.execution.log_every=1")
    files = []
    for name, stops in {"whole": False, "stopped": True}.items():
        command = (*long, f"--workdir={tmp_path / name}")
        process = modjax(*command)
        if stops:
            metrics = f"{name}/runs/*/metrics.jsonl"
            while sum(path.read_text().count("\n") for path in tmp_path.glob(metrics)) < 10:
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
            assert process.wait() == 75
            assert not list(tmp_path.glob(f"{name}/runs/*/routers.safetensors"))
            process = modjax(*command)
        assert process.wait() == 0, process.stderr.read()
        files += [path.read_bytes() for path in tmp_path.glob(f"{name}/runs/*/routers.safetensors")]
    assert files[0] == files[1] and len(files) == 2


@pytest.mark.parametrize(
    "change, said_",
    [
        ("--config.train.trained=all", "train.trained = 'all': must be 'routers'"),
        ("--config.base=x", "/x': must be /"),
        ("--config.train.steps=x", "--config.train.steps = 'x': must be of type int"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(
    arguments, said, tmp_path, change, said_
):
    code, out, err = said(*arguments, f"--workdir={tmp_path / 'new'}", change)
    assert (code, out) == (2, "") and said_ in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
