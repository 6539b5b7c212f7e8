"""Leases in an object store: what test_lease.py tests on a file system."""

import time
from pathlib import Path

import pytest

from modjax import bucket as stores
from modjax.scaling.workers import lease
from modjax.scaling.workers.lease import Lost, Observer
from tests.scaling.workers.test_lease import (
    SECONDS,
    assert_a_paused_holder_writes_no_more,
    winners,
)


@pytest.fixture
def folder(machine) -> Path:
    """The copy of a run's folder."""
    folder = machine("first") / "runs" / "one"
    folder.mkdir(parents=True)
    return folder


def test_of_many_rivals_one_gets_the_lease(bucket, folder):
    bucket.seconds = 0.02
    assert winners(folder) == 1
    assert bucket.objects["w/runs/one/lease-000000001"] == lease.FREE.encode()


def test_a_paused_holder_that_wakes_writes_no_more(folder):
    assert_a_paused_holder_writes_no_more(folder)


def test_a_holder_whose_clock_stood_still_sees_its_successor(folder, monkeypatch):
    first = Observer(SECONDS, clock=lambda: 0.0)
    with first.hold(folder) as guard:
        stores.write(folder / "lease-000000002", b"of another")
        guard()  # it does not look at each step of training
        first.clock = lambda: SECONDS / 2
        with pytest.raises(Lost):
            guard()


def test_a_store_that_is_slow_and_fails_at_times_loses_no_lease(bucket, folder):
    seconds = 1.0
    bucket.seconds, bucket.failing = seconds / 20, 0.05
    other, asked, failed = Observer(seconds), 0, 0
    while True:
        try:
            with Observer(seconds).hold(folder) as guard:
                until = time.monotonic() + 6 * seconds
                while guard is not None and time.monotonic() < until:
                    guard()
                    try:
                        assert other.is_held(folder)
                        asked += 1
                    except OSError:
                        failed += 1
                    time.sleep(0.02)
                break
        except OSError:
            continue
    assert failed > 0 and asked > 5 * failed
    assert [name for name in bucket.objects if "lease" in name] == ["w/runs/one/lease-000000001"]


def test_a_lease_is_taken_over_from_a_store_that_fails_at_times(bucket, folder):
    for name, content in (("lease-000000003", "left"), ("lease-000000002", lease.FREE)):
        bucket.objects[f"w/runs/one/{name}"] = content.encode()
    bucket.failing = 0.3
    with Observer(SECONDS).hold(folder) as guard:
        bucket.failing = 0.0
        if guard is not None:  # else it could not create one
            guard()
            assert "w/runs/one/lease-000000004" in bucket.objects
