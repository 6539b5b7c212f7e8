"""Checkpoints are bounded in number, verified, and refused if they belong to another run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.errors import InputError
from modjax.training.checkpoint import DIGEST, Checkpoints, find_damage, read_checkpoint
from modjax.training.state import TrainState, Weights

IDENTITY = {"run_id": "this", "data_fingerprint": "f"}


def state_at(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"w": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)}
    measured = {"threshold": params["w"][0] * 3}
    moments = {"m": params["w"] * 2}
    return TrainState(
        params, {}, measured, moments, jnp.int32(step), jnp.int32(0), jnp.float32(0), jnp.int32(0)
    )


def opened(folder, identity=IDENTITY, keep=2):
    return Checkpoints(folder, keep=keep, identity=identity)


@pytest.fixture
def folder(tmp_path):
    """A folder with the states of steps 3 and 5. The state of step 1 was deleted."""
    checkpoints = opened(tmp_path / "checkpoints")
    for step in (1, 3, 5):
        checkpoints.save(step, state_at(step), {"train": float(step)})
    checkpoints.wait()
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder, **options):
    checkpoints = opened(folder, **options)
    try:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0)
        )
        return checkpoints.restore(abstract)
    finally:
        checkpoints.close()


def assert_same(state, step):
    for ours, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_newest_comes_back_bit_for_bit_and_their_number_is_bounded(folder):
    state, seconds = restore(folder)
    assert_same(state, 5)
    assert seconds == {"train": 5.0}
    assert sorted(path.name for path in folder.iterdir()) == ["3", "5"]


def read_so_far() -> int:
    """Returns the number of bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_weights_are_read_without_the_moments_of_the_optimizer(tmp_path):
    moments = np.random.default_rng(0).normal(size=(8, 2**18)).astype(np.float32)
    state = state_at(3)._replace(opt_state={"m": jnp.asarray(moments)})
    checkpoints = opened(tmp_path)
    checkpoints.save(3, state, {})
    checkpoints.close()
    weights = Weights(state.params, {}, state.measured)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights
    )
    before = read_so_far()
    found, _ = read_checkpoint(tmp_path / "3", abstract, IDENTITY)
    assert read_so_far() - before < moments.nbytes / 4
    jax.tree.map(np.testing.assert_array_equal, found, weights)
    assert jax.tree.leaves(found)[0].sharding == jax.tree.leaves(weights)[0].sharding
    with pytest.raises(InputError, match="a checkpoint of another run"):
        read_checkpoint(tmp_path / "3", abstract, IDENTITY | {"run_id": "other"})


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path / "checkpoints") is None


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
def test_damage_to_any_file_with_content_is_found(folder, damage):
    digest = json.loads((folder / "5" / DIGEST).read_text())
    assert find_damage(folder / "5") is None
    assert any("ocdbt" in name for name in digest)
    for name in digest:
        path = folder / "5" / name
        content = path.read_bytes()
        if content:
            damage(path)
            assert find_damage(folder / "5") is not None, name
            path.write_bytes(content)
    assert find_damage(folder / "5") is None


@pytest.mark.parametrize("which", ["largest", DIGEST])
def test_a_damaged_newest_is_set_aside_with_a_message_and_the_one_before_used(
    folder, which, caplog, capfd
):
    largest = max(files_of(folder / "5"), key=lambda path: path.stat().st_size)
    truncate(largest if which == "largest" else folder / "5" / DIGEST)
    state, _ = restore(folder)
    assert_same(state, 3)
    assert (folder / "damaged-5").is_dir() and not (folder / "5").exists()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "modjax"]
    assert "checkpoint 5 is damaged" in message and "damaged-5" in message
    assert capfd.readouterr().err == ""
    # A later state of the same step is stored and damaged once more.
    checkpoints = opened(folder)
    checkpoints.save(5, state_at(5), {})
    checkpoints.wait()
    checkpoints.close()
    truncate(max(files_of(folder / "5"), key=lambda path: path.stat().st_size))
    assert_same(restore(folder)[0], 3)
    assert (folder / "damaged-5-again").is_dir()


def test_all_damaged_restores_nothing(folder):
    for step in (3, 5):
        truncate(max(files_of(folder / str(step)), key=lambda path: path.stat().st_size))
    assert restore(folder) is None


@pytest.mark.parametrize("name", ["run_id", "data_fingerprint"])
def test_a_checkpoint_of_another_run_is_refused_in_one_line_and_kept(folder, name):
    with pytest.raises(InputError) as refusal:
        restore(folder, identity=IDENTITY | {name: "other"})
    assert name in str(refusal.value) and "'other'" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert_same(restore(folder)[0], 5)


def test_what_a_kill_left_half_written_is_ignored_and_removed(folder):
    half = folder / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half")
    assert_same(restore(folder)[0], 5)
    assert not half.exists()


FILL_THE_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.training.test_checkpoint import assert_same, opened, restore, state_at
folder = Path(sys.argv[1]) / "checkpoints"
checkpoints = opened(folder, keep=1000)
step = 0
try:
    while step < 1000:
        step += 1
        checkpoints.save(step, state_at(step), {})
        checkpoints.wait()
except OSError as error:
    print(error.strerror)
assert_same(restore(folder, keep=1000)[0], step - 1)
"""


def test_a_full_disk_is_an_oserror_and_the_checkpoint_before_is_whole(tmp_path, child_environment):
    root = Path(__file__).parents[2]
    script = f'mount -t tmpfs -o size=1M tmpfs "{tmp_path}" && "$@"'
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*enter, script, "sh", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs permission to mount a small file system")
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), str(root)]
    done = subprocess.run(
        [*enter, script, "sh", *command],
        env=child_environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "No space left on device\n"


@pytest.mark.parametrize("digest", ["{}", "[]", "[[[", '{"_METADATA": "0"}'])
def test_a_digest_that_leaves_files_out_is_not_believed(tmp_path, digest):
    checkpoints = opened(tmp_path)
    checkpoints.save(5, state_at(5), {})
    checkpoints.wait()
    checkpoints.close()
    assert find_damage(tmp_path / "5") is None
    whole = json.loads((tmp_path / "5" / DIGEST).read_text())
    (tmp_path / "5" / DIGEST).write_text(digest)
    assert find_damage(tmp_path / "5") is not None
    missing = whole.popitem()[0]
    (tmp_path / "5" / DIGEST).write_text(json.dumps(whole))
    assert find_damage(tmp_path / "5") == f"{DIGEST} leaves out {missing}"
