"""After a signal, a sweep tells the truth about its state, and the same command continues."""

import os
import random
import signal
import time

import pytest

from tests.reliability.small import assert_same_bytes, children, files, finish

pytestmark = pytest.mark.slow


def wait_for_training(process, workdir) -> None:
    """Waits until the sweep has logged something new, or has ended."""
    deadline, before = time.monotonic() + 120, files(workdir, "metrics.jsonl")
    while files(workdir, "metrics.jsonl") == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_one_signal_saves_every_state(sweep, undisturbed, tmp_path, count, number, code):
    rng, workdir = random.Random(code), tmp_path / "work"
    for _ in range(3):
        process = sweep(workdir, "--config.execution.checkpoint_seconds=1000")
        wait_for_training(process, workdir)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(number)
        _, err = process.communicate(timeout=100)
        if process.returncode == 0:
            break  # it was faster
        assert process.returncode == code
        assert err.splitlines()[-1].startswith("modjax: stopped, state saved")
        count(f"{number.name}s after which the state was saved")
    finish(sweep(workdir))
    assert_same_bytes(workdir, undisturbed)


def test_two_signals_stop_at_once_and_say_that_nothing_was_saved(
    sweep, undisturbed, tmp_path, count
):
    workdir = tmp_path / "work"
    process = sweep(workdir)
    wait_for_training(process, workdir)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGSTOP)  # so that it cannot save before the second
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("modjax: stopped, state not saved")
    count("second SIGINTs that claimed nothing")
    finish(sweep(workdir))
    assert_same_bytes(workdir, undisturbed)


def test_workers_that_get_sigterm_save_and_go_on(sweep, undisturbed, tmp_path, count):
    workdir, rng = tmp_path / "work", random.Random(0)
    process = sweep(workdir)
    wait_for_training(process, workdir)
    for _ in range(6):
        time.sleep(rng.uniform(0.3, 1.5))
        if process.poll() is None:
            for pid in children(process.pid):
                os.kill(pid, signal.SIGTERM)
                count("SIGTERMs to workers")
    finish(process)
    assert not files(workdir, "failure.json")
    assert_same_bytes(workdir, undisturbed)
