"""Checkpoints in a bucket: takeovers by other machines, half-written ones, and rivals."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from modjax import bucket as stores
from modjax.bucket import Conflict
from modjax.files import write_atomically
from modjax.training.stored import DIGEST, digest_of, find_damage, pull_newest, pull_one, push
from tests.training.child import LEASE
from tests.training.killed import KILLED, assert_same_end, wait_for
from tests.training.tiny import run_spec

URL = "gs://bucket/w"
RUN = f"w/runs/{run_spec(**KILLED).run_id}"


@pytest.fixture
def checkpoints(machine):
    """Makes this process a machine of that name, and returns the folder of its checkpoints."""
    return lambda name: machine(name) / "runs" / Path(RUN).name / "checkpoints"


def steps(bucket, file: str = DIGEST) -> list[int]:
    """Returns the steps of the checkpoints in the bucket that have a file."""
    found = (re.fullmatch(rf"{RUN}/checkpoints/(\d+)/{file}", name) for name in bucket.objects)
    return sorted(int(match[1]) for match in found if match)


def make(folder: Path, step: int, text: str = "") -> None:
    """Makes a checkpoint of four files, and a line of metrics, as training does."""
    import json

    for name in ("meta", "state/a", "state/b/c"):
        path = folder / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{step} {name} {text}")
    (folder / str(step) / DIGEST).write_text(json.dumps(digest_of(folder / str(step))))
    with open(folder.with_name("metrics.jsonl"), "a") as file:
        file.write(f'{{"step": {step}}}\n')


def test_a_killed_run_is_taken_over_by_another_machine_and_ends_in_the_same_bytes(
    bucket, checkpoints, start, undisturbed, tmp_path
):
    process = start(URL, XDG_CACHE_HOME=str(tmp_path / "first"), **bucket.environment)
    wait_for(process, 20)
    while not steps(bucket):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert f"{RUN}/result.json" not in bucket.objects
    newest = steps(bucket)[-1]
    began = time.monotonic()
    process = start(URL, XDG_CACHE_HOME=str(tmp_path / "second"), **bucket.environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert time.monotonic() - began > LEASE, "it has waited for the end of the lease"
    assert newest < int(output.split()[1]) <= newest + 2, "it goes on from the checkpoint"
    copy = checkpoints("second").parent
    assert_same_end(copy, undisturbed)
    for name in ("metrics.jsonl", "result.json"):
        assert bucket.objects[f"{RUN}/{name}"] == (copy / name).read_bytes()
    assert steps(bucket)[-1] == KILLED["steps"] and len(steps(bucket)) <= 2
    assert steps(bucket, "_CHECKPOINT_METADATA") == steps(bucket)
    assert not [name for name in bucket.objects if "tmp" in name]
    last = checkpoints("third") / str(KILLED["steps"])
    pull_one(last)
    assert digest_of(last) == digest_of(copy / "checkpoints" / last.name)


def test_a_half_written_checkpoint_is_never_used(bucket, checkpoints):
    folder, used = checkpoints("first"), set()
    make(folder, 5)
    push(folder)
    make(folder, 10)
    before = dict(bucket.objects)
    for left in range(1, 40):
        bucket.objects = dict(before)
        bucket.left = left
        checkpoints("first")
        try:
            push(folder)
        except OSError:
            pass
        whole = bucket.left
        bucket.left = None
        if whole:
            break
        other = checkpoints(f"other{left}")
        pull_newest(other)
        (found,) = other.iterdir()
        assert find_damage(found) is None
        used.add(int(found.name))
        assert steps(bucket, "meta") == steps(bucket), "the half-written one is gone"
    assert used == {5, 10}
    assert left == 8 and steps(bucket) == [5, 10]


def test_the_bucket_forgets_what_training_deletes_and_what_another_machine_has_damaged(
    bucket, checkpoints
):
    first = checkpoints("first")
    make(first, 5)
    make(first, 10)
    push(first)
    bucket.objects[f"{RUN}/checkpoints/10/../../../../escaped"] = b"not into the copy"
    second = checkpoints("second")
    pull_newest(second)
    assert [path.name for path in second.iterdir()] == ["10"]
    assert not list(second.parents[6].rglob("escaped"))
    bucket.objects[f"{RUN}/checkpoints/10/meta"] = b"damaged"
    third = checkpoints("third")
    pull_newest(third)
    assert sorted(path.name for path in third.iterdir()) == ["10", "5"]
    assert find_damage(third / "10") is not None and find_damage(third / "5") is None
    (third / "10").rename(third / "damaged-10")
    make(third, 10, "again")
    make(third, 15)
    push(third)
    assert bucket.objects[f"{RUN}/checkpoints/10/meta"] == b"10 meta again"
    assert steps(bucket) == [5, 10, 15]
    checkpoints("first")
    pull_newest(first)
    assert sorted(path.name for path in first.iterdir()) == ["10", "15", "5"]
    assert all(find_damage(path) is None for path in first.iterdir())
    shutil.rmtree(first / "5")
    push(first)
    assert steps(bucket, "meta") == [10, 15]


def test_a_process_that_has_lost_its_run_writes_no_checkpoint_over_another_one(
    bucket, checkpoints, monkeypatch
):
    first = checkpoints("first")
    make(first, 5)

    def listed(folder):
        """Another machine writes the same step after this one has looked."""
        found = stores.names(folder)
        bucket.objects[f"{RUN}/checkpoints/5/state/a"] = b"of the second"
        return found

    monkeypatch.setattr("modjax.training.stored.names", listed)
    with pytest.raises(Conflict, match=r"checkpoints/5': was written by another machine"):
        push(first)
    assert bucket.objects[f"{RUN}/checkpoints/5/state/a"] == b"of the second"
    assert steps(bucket) == []


def test_metrics_of_a_process_that_has_lost_its_run_are_refused(bucket, checkpoints):
    first = checkpoints("first").parent
    first.mkdir(parents=True)
    write_atomically(first / "metrics.jsonl", "1\n")
    kept = dict(stores._seen)
    second = checkpoints("second").parent
    second.mkdir(parents=True)
    stores.fetch(second)
    assert (second / "metrics.jsonl").read_bytes() == b"1\n"
    write_atomically(second / "metrics.jsonl", "1\n2\n")
    checkpoints("first")
    stores._seen.update(kept)
    with pytest.raises(Conflict, match=r"^--workdir = 'gs://bucket/w/runs/.*/metrics.jsonl': was"):
        write_atomically(first / "metrics.jsonl", "1\nother\n")
    assert bucket.objects[f"{RUN}/metrics.jsonl"] == b"1\n2\n"
