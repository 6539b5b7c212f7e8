"""A worker that trains one run after another needs no more memory."""

import threading
import time
from pathlib import Path

import pytest

from tests.reliability.small import children

pytestmark = pytest.mark.slow

SEEDS = 9  # times four runs


def resident(pid: int) -> float:
    """Returns the memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def test_a_worker_does_not_grow_from_run_to_run(sweep, tmp_path, count):
    seeds = ",".join(map(str, range(SEEDS)))
    process = sweep(tmp_path / "work", "--jobs=1", f"--config.sweep.seeds={seeds}")
    reader = threading.Thread(target=process.communicate)  # its records fill a pipe
    reader.start()
    after, done = {}, 0
    while process.poll() is None:
        now = len(list(tmp_path.glob("work/runs/*/result.json")))
        if now > done:
            time.sleep(0.3)  # it is between two runs, or has just begun the next
            (worker,) = children(process.pid)
            done, after[now] = now, resident(worker)
        time.sleep(0.02)
    reader.join()
    assert process.returncode == 0 and len(after) > 20
    early, late = (
        sorted(mb for run, mb in after.items() if run in some)
        for some in (range(8, 16), range(28, 36))
    )
    growth = late[len(late) // 2] - early[len(early) // 2]
    print(f"a worker's memory: {after}")
    assert growth < 20, "MB in 20 runs; it was 40 before"
    count("runs of one worker whose memory did not grow", len(after))
