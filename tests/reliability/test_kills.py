"""Sweeps with real training, killed at random points, in compilation and in checkpoint writes."""

import random
import time

import pytest

from tests.reliability.small import RUNS, assert_same_bytes, files, finish, kill_all

pytestmark = pytest.mark.slow


def lines(workdir) -> int:
    return sum(text.count(b"\n") for text in files(workdir, "metrics.jsonl").values())


def test_killed_with_its_workers_a_sweep_ends_in_the_same_bytes(
    sweep, undisturbed, tmp_path, count
):
    killed, rng, total = tmp_path / "killed", random.Random(0), lines(undisturbed)
    for share in (rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.8)):
        process = sweep(killed)
        deadline = time.monotonic() + 120
        while lines(killed) < share * total:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        count("SIGKILLs of launchers and workers", kill_all(process))
        begun, done = files(killed, "metrics.jsonl"), files(killed, "result.json")
        assert set(begun) - set(done), "killed in the middle of a run"
    before = files(killed, "result.json")
    finish(sweep(killed))
    after = files(killed, "result.json")
    assert before.items() <= after.items(), "a finished run is not repeated"
    assert not files(killed, "failure.json")
    count("arrays compared bit for bit", assert_same_bytes(killed, undisturbed))


@pytest.mark.parametrize("where", ["compilation", "checkpoint writes"])
def test_killed_at_any_moment_a_sweep_ends_in_the_same_bytes(
    sweep, undisturbed, tmp_path, count, where
):
    rng, workdir, caught = random.Random(where), tmp_path / "work", 0
    # Without kept programs, half of the time is compilation; else the disk is always written to.
    often = ["--config.execution.checkpoint_seconds=0.02"] * (where == "checkpoint writes")
    for turn in range(12):
        env = {"XDG_CACHE_HOME": str(tmp_path / f"cache{turn}")} if where == "compilation" else {}
        process = sweep(workdir, *often, **env)
        time.sleep(rng.uniform(3, 9))
        if process.poll() is not None:
            break
        caught += any(workdir.glob("runs/*/checkpoints/*orbax-checkpoint-tmp*"))
        count(f"SIGKILLs in runs of mostly {where}", kill_all(process))
    count("kills that left half a checkpoint", caught)
    finish(sweep(workdir))
    count("arrays compared bit for bit", assert_same_bytes(workdir, undisturbed))


@pytest.mark.parametrize("launchers", [2, 4])
def test_several_launchers_under_kills_do_every_run_once(
    sweep, undisturbed, tmp_path, count, launchers
):
    rng, workdir, kills = random.Random(launchers), tmp_path / "work", 0
    started = [sweep(workdir, "--jobs=1") for _ in range(launchers)]
    first_seen: dict[str, int] = {}
    deadline = time.monotonic() + 400
    while len(first_seen) < RUNS:
        assert time.monotonic() < deadline
        for path in workdir.glob("runs/*/result.json"):
            inode = path.stat().st_ino
            assert first_seen.setdefault(path.parent.name, inode) == inode, "done twice"
        time.sleep(0.3)
        if kills < 3 * launchers and rng.random() < 0.1:
            i = rng.randrange(launchers)
            kills += kill_all(started[i])
            started[i] = sweep(workdir, "--jobs=1")
    for process in started:
        finish(process)
    count("SIGKILLs under several launchers", kills)
    count("runs that several launchers did once", len(first_seen))
    count("arrays compared bit for bit", assert_same_bytes(workdir, undisturbed))


def test_killed_on_one_machine_a_sweep_in_a_bucket_ends_in_the_same_bytes_on_another(
    bucket, sweep, undisturbed, tmp_path, count
):
    def done(name):
        return [key for key in dict(bucket.objects) if key.startswith("w/") and key.endswith(name)]

    def start(name):
        return sweep("gs://bucket/w", "--lease=2", XDG_CACHE_HOME=str(tmp_path / name))

    for turn in range(3):
        process, before = start(f"machine-{turn}"), len(done("/digest.json"))
        deadline = time.monotonic() + 120
        while len(done("/digest.json")) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.Random(turn).uniform(0, 1.0))
        count("SIGKILLs of machines with a bucket", kill_all(process))
    finish(start("last"))
    assert len(done("/result.json")) == RUNS
    for key, content in bucket.objects.items():
        (tmp_path / "copied" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copied" / key).write_bytes(content)
    count("arrays compared bit for bit", assert_same_bytes(tmp_path / "copied" / "w", undisturbed))
