"""The choice of mesh and rematerialisation, against the rule applied to every choice."""

import collections
import dataclasses
import functools
import json

import jax
import pytest

from modjax.errors import InputError
from modjax.kernels.chips import described_devices
from modjax.specs import Dense, Execution, ModelSpec, TrainConfig
from modjax.training.fitting import REMATS, device_memory, fitted
from modjax.training.loop import train
from modjax.training.mesh import make_mesh
from modjax.training.programs import lower_train_step
from modjax.training.state import abstract_model
from tests.training.tiny import model, run_spec, train_config

MODEL = abstract_model(model(layers=(Dense(),), num_layers=4))
TRAIN = train_config(seq_len=64)
SCAN = Execution(layer_loop="scan")  # unrolled on CPU, XLA undoes rematerialisation


@pytest.fixture(autouse=True, scope="module")
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def needed(fsdp: int, remat: str) -> int:
    """Returns the bytes that the step takes on each of two devices, by XLA's account."""
    execution = dataclasses.replace(SCAN, fsdp=fsdp, remat=remat)
    mesh = make_mesh(execution, jax.devices()[:2])
    found = lower_train_step(mesh, MODEL, TRAIN, execution).compile().memory_analysis()
    assert found.alias_size_in_bytes > 0.9 * found.output_size_in_bytes, "the state is donated"
    inputs_and_more = found.argument_size_in_bytes + found.temp_size_in_bytes
    return inputs_and_more + found.output_size_in_bytes - found.alias_size_in_bytes


def fit(memory: int | None, devices: int = 2, train: TrainConfig = TRAIN, **changes):
    execution = dataclasses.replace(SCAN, **changes)
    return fitted(MODEL, train, execution, jax.devices()[:devices], memory)


def test_the_account_of_memory_tells_the_choices_apart():
    assert needed(1, "none") > needed(1, REMATS[1]) > needed(1, REMATS[2]) > needed(1, "full")
    assert needed(1, "full") > needed(2, "full")
    assert "hidden" in REMATS[1] and "hidden" not in REMATS[2]


@pytest.mark.parametrize(
    ("fits", "short", "chosen"),
    [
        ((1, "none"), 0, (1, "none")),
        ((1, "none"), 1, (1, REMATS[1])),
        ((1, REMATS[2]), 0, (1, REMATS[2])),
        ((1, "full"), 0, (1, "full")),
        ((1, "full"), 1, (2, "context")),
    ],
)
def test_the_fewest_chips_come_first_and_then_the_least_recomputation(fits, short, chosen):
    memory = needed(*fits) - short
    found = fit(memory)
    assert (found.execution.fsdp, found.execution.remat) == chosen
    assert found.mesh.devices.shape == (2 // chosen[0], chosen[0], 1, 1)
    account = found.step.memory_analysis()
    assert account.argument_size_in_bytes + account.temp_size_in_bytes <= memory


def test_given_sizes_and_remat_are_kept():
    found = fit(needed(1, "none"), fsdp=2)
    assert (found.execution.fsdp, found.execution.remat) == (2, "none")
    found = fit(needed(1, "none") - 1, remat="none")
    assert (found.execution.fsdp, found.execution.remat) == (2, "none")
    assert fit(1, fsdp=2, remat="full")[1:] == (
        dataclasses.replace(SCAN, fsdp=2, remat="full"),
        None,
    )


def test_choosing_again_for_another_run_of_the_same_shape_compiles_nothing():
    memory, found = needed(1, "none") - 1, collections.Counter()
    jax.clear_caches()  # small programs of other tests had other options
    first = fit(memory)

    def listen(event: str, **about) -> None:
        found.update([event.rpartition("/")[2]])

    jax.clear_caches()
    jax.monitoring.register_event_listener(listen)
    try:
        changed = dataclasses.replace(TRAIN, learning_rate=0.5, steps=99, seed=7)
        again = fit(memory, train=changed)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert again.execution == first.execution
    assert found["cache_hits"] >= 3 and found["cache_misses"] == 0


def test_without_a_known_memory_nothing_is_compiled():
    assert device_memory() is None
    found = fit(None, 8)
    assert found[1:] == (dataclasses.replace(SCAN, fsdp=1, remat="none"), None)
    assert found.mesh.shape["data"] == 8


def test_what_cannot_fit_is_not_compiled_and_sizes_that_do_not_divide_are_left_out(caplog):
    with jax.log_compiles(), pytest.raises(InputError) as caught:
        fit(60_000, 3, dataclasses.replace(TRAIN, batch_size=9))  # 16 / 3 is no whole number
    assert "jit(train_step)" not in caplog.text
    said = str(caught.value)
    assert said.startswith("train.batch_size = 9: does not fit into the 0.00 GiB of a device")
    assert "raise execution.tensor, or" in said and "\n" not in said
    with pytest.raises(InputError, match=r"raise execution.fsdp or tensor, or"):
        fit(60_000, fsdp=2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fsdp": 3}, "execution.fsdp * tensor * expert = 3: must divide"),
        ({"tensor": 16}, "execution.fsdp * tensor * expert = 16: must divide"),
        ({"tensor": 4}, "execution.tensor = 4: must divide 2, the kv_heads"),
        ({"data": 9}, "execution.data = 9: needs 9 devices"),
    ],
)
def test_a_mesh_that_does_not_suit_is_refused_as_ever(changes, says):
    with pytest.raises(InputError) as caught:
        fit(10**9, 8, **changes)
    assert str(caught.value).startswith(says)


def test_a_run_says_and_records_what_was_chosen(tiny_data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("modjax.training.trainer.device_memory", lambda: 10**9)
    spec, lines = run_spec(layers=(Dense(),), steps=2), []
    execution = dataclasses.replace(SCAN, data=2, tensor=2)
    record = train(spec, execution, run_dir=tmp_path, data_dir=tiny_data_dir, progress=lines.append)
    assert lines[0] == {"step": 0, "mesh": "data 2, tensor 2", "remat": "none"}
    assert record.provenance.items() >= {"mesh": "data 2, tensor 2", "remat": "none"}.items()
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, written)) == lines[1:]


@pytest.mark.slow
# jax's cache stores programs for devices that are not there, but cannot read them.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_on_a_tpu_slice_that_is_not_there_more_chips_join_until_the_step_fits():
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'jax[tpu]'")
    small = abstract_model(ModelSpec(1024, 512, 2, 4, 4, 2048, dtype="bfloat16"))
    devices, execution = described_devices("v5e:2x2"), Execution(remat="full")

    def on_slice(batch_size: int, memory: int):
        train = TrainConfig(batch_size, 512, 1000, 1e-3, 20)
        found = fitted(small, train, execution, devices, memory)
        account = found.step.memory_analysis()
        return found.execution.fsdp, account.argument_size_in_bytes + account.temp_size_in_bytes

    one_chip, least = on_slice(8, 2**34)
    more_chips, needed = on_slice(8, least - 1)
    assert one_chip == 1 < more_chips and needed < least
    # The compiler raises an error where a chip's memory is too small, whatever `memory` says.
    with pytest.raises(InputError, match=r"does not fit into the 1024.00 GiB of a device"):
        on_slice(2**15, 2**40)
