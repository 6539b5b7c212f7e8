"""Leases: one holder at a time, whatever the clocks say, if processes pause and stores fail."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from modjax.errors import InputError
from modjax.records import run_dir
from modjax.scaling.plan.experiment import load
from modjax.scaling.workers import lease, worker
from modjax.scaling.workers.lease import Lost, Observer
from modjax.specs import Execution, to_dict
from tests.scaling.small_sweep import (
    CONFIG,
    SMALL,
    assert_one_result_per_run,
    lines,
    run,
    start,
    wait_until,
)

SECONDS = 0.4


def wait_until_free(observer, folder, seconds=20.0):
    deadline = time.monotonic() + seconds
    while observer.is_held(folder):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_one_process_holds_a_run_and_gives_it_back(tmp_path):
    first, second = Observer(SECONDS), Observer(SECONDS)
    with first.hold(tmp_path) as guard:
        guard()
        assert second.is_held(tmp_path)
        with second.hold(tmp_path) as other:
            assert other is None
        time.sleep(3 * SECONDS)  # it is renewed
        assert second.is_held(tmp_path)
        guard()
    assert not second.is_held(tmp_path)
    with second.hold(tmp_path) as guard:
        guard()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "lease-000000001",
        "lease-000000002",
    ]


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_clocks_that_differ_by_an_hour_change_nothing(tmp_path, skew):
    first = Observer(SECONDS, clock=lambda: time.monotonic() + skew)
    second = Observer(SECONDS)
    with first.hold(tmp_path) as guard:
        for path in tmp_path.iterdir():  # the store's own clock, too
            os.utime(path, (0, 0))
        until = time.monotonic() + 3 * SECONDS
        while time.monotonic() < until:
            assert second.is_held(tmp_path)
            guard()


def winners(folder) -> int:
    """Returns how many of eight rivals, who ask at once, hold the run."""
    got, ready = [], threading.Barrier(8)

    def rival():
        ready.wait()
        with Observer(SECONDS).hold(folder) as guard:
            got.append(guard is not None)
            ready.wait()

    threads = [threading.Thread(target=rival) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(got)


def test_of_many_rivals_one_gets_the_lease(tmp_path):
    assert winners(tmp_path) == 1


def _write_under_lease(folder, seconds):
    with Observer(seconds).hold(folder) as guard:
        while True:
            guard()
            with open(folder / "written", "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.01)


def assert_a_paused_holder_writes_no_more(folder):
    process = multiprocessing.get_context("spawn").Process(
        target=_write_under_lease, args=(folder, SECONDS)
    )
    process.start()
    observer, written = Observer(SECONDS), folder / "written"
    try:
        wait_until(written.exists, 60)
        os.kill(process.pid, signal.SIGSTOP)
        wait_until_free(observer, folder)
        with observer.hold(folder) as guard:
            guard()
            before = written.read_text()
            os.kill(process.pid, signal.SIGCONT)
            process.join(20)
            assert process.exitcode == 1, "it raised Lost"
            lines = written.read_text().splitlines()
            # At most the one write that had passed its guard when it was paused.
            assert len(lines) <= len(before.splitlines()) + 1
            guard()
    finally:
        process.kill()


def test_a_paused_holder_that_wakes_writes_no_more(tmp_path):
    assert_a_paused_holder_writes_no_more(tmp_path)


def test_a_holder_that_cannot_renew_stops_by_itself(tmp_path, monkeypatch):
    with Observer(SECONDS).hold(tmp_path) as guard:
        monkeypatch.setattr(Path, "write_text", _refuse)
        time.sleep(1.5 * SECONDS)
        with pytest.raises(Lost, match=r"^lease = '.*': was lost: another process may do the run$"):
            guard()


def _refuse(*arguments, **options):
    raise OSError(errno.EIO, "Input/output error")


def test_a_store_that_is_slow_and_fails_at_times_loses_no_lease(tmp_path, monkeypatch):
    rng, seconds = random.Random(0), 1.0
    for name in ("read_text", "write_text"):
        real = getattr(Path, name)

        def unsteady(*arguments, real=real, **options):
            time.sleep(rng.random() * seconds / 10)
            if rng.random() < 0.05:
                _refuse()
            return real(*arguments, **options)

        monkeypatch.setattr(Path, name, unsteady)
    other, asked = Observer(seconds), 0
    with Observer(seconds).hold(tmp_path) as guard:
        until = time.monotonic() + 6 * seconds
        while time.monotonic() < until:
            guard()
            try:
                assert other.is_held(tmp_path)
            except OSError:
                asked += 1
            time.sleep(0.02)
    assert lease.newest(tmp_path).name == "lease-000000001"


def test_a_lease_is_taken_over_from_a_store_that_fails_at_times(tmp_path, monkeypatch):
    rng, real = random.Random(1), Path.read_text
    for name, content in (("lease-000000003", "left"), ("lease-000000002", lease.FREE)):
        (tmp_path / name).write_text(content)

    def unsteady(*arguments, **options):
        if rng.random() < 0.3:
            _refuse()
        return real(*arguments, **options)

    monkeypatch.setattr(Path, "read_text", unsteady)
    with Observer(SECONDS).hold(tmp_path) as guard:
        guard()
        monkeypatch.setattr(os, "listdir", _refuse)
        guard()  # the store does not answer, but nobody can have taken the lease yet
    assert (tmp_path / "lease-000000004").exists()


def test_a_lost_run_is_left_to_its_new_holder(tmp_path, monkeypatch):
    settings = worker.Settings(
        "stand_in", str(tmp_path), str(tmp_path), "f", Execution(), {}, {}, False
    )
    (spec, *_) = load(str(CONFIG), SMALL).specs

    def in_its_folder(*arguments):
        raise Lost(tmp_path / spec.run_id)

    run_dir(tmp_path, spec.run_id).mkdir(parents=True)
    monkeypatch.setattr(worker, "_print_to", lambda path: None)
    event, why = worker.do({"spec": to_dict(spec)}, settings, None, print, in_its_folder)
    assert event == "busy" and why.startswith("lease = ")


def test_launchers_without_locks_do_each_run_once_and_take_over_dropped_ones(folders):
    (folders[1] / "seconds").write_text("0.5")
    launchers = [start(folders, lease=2.0) for _ in range(2)]
    wait_until(lambda: any(lines(folders, "starts").values()), 60)
    victim = next(int(pids[0]) for pids in lines(folders, "starts").values() if pids)
    os.kill(victim, signal.SIGKILL)
    for launcher in launchers:
        output, errors = launcher.communicate(timeout=120)
        assert output.split() == [b"6", b"0"], errors.decode()
    assert_one_result_per_run(folders)
    assert list(folders[0].glob("runs/*/lease-*")) and not list(folders[0].glob("runs/*/lock"))
    assert sum(len(pids) for pids in lines(folders, "starts").values()) <= 8


def test_a_lease_that_is_too_short_is_one_line(folders):
    with pytest.raises(InputError, match=r"^--lease = 0.5: must be 0, for locks, or at least 1 s"):
        run(folders, load(str(CONFIG), SMALL), lease=0.5)
