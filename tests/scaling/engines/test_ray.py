"""Sweeps on real Ray clusters on this machine. Training is a stand-in."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `ray`")

from modjax.errors import InputError
from modjax.scaling.engines.engine import options_of
from modjax.scaling.engines.local import Local
from modjax.scaling.plan.experiment import load
from tests.scaling.small_sweep import (
    CONFIG,
    SMALL,
    assert_one_result_per_run,
    lines,
    run,
    run_ids,
    wait_until,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
GRID = ("sweep.sizes=6", "sweep.seeds=0,1,2,3,4", "sweep.budgets=5e11")  # 60 runs
KILLS = 20
DRIVER = """
import sys
from pathlib import Path
from modjax.scaling import sweep
from modjax.scaling.engines.engine import options_of
from modjax.scaling.plan.experiment import load
sweep.JOB = "stand_in"
config, workdir, data_dir, address = sys.argv[1:5]
outcome = sweep.sweep(load(config, sys.argv[5:]), workdir=Path(workdir), data_dir=Path(data_dir),
                      engine=options_of("ray", {"address": address, "jobs": "4"}),
                      data_fingerprint="f")
print(len(outcome.records), len(outcome.failures))
"""


def ray_sweep(folders, **texts):
    engine = options_of("ray", {"jobs": "2", "cores": "0.5", **texts})
    return run(folders, load(str(CONFIG), SMALL), engine)


def test_a_sweep_on_a_cluster_of_its_own_does_each_run_once(folders):
    crash, boom, *_ = run_ids()
    (folders[1] / "crash").write_text(crash)
    (folders[1] / "boom").write_text(boom)
    outcome = ray_sweep(folders)
    assert outcome.failures == {crash: "killed by SIGKILL", boom: "ValueError: boom and more"}
    starts, finishes = (lines(folders, name) for name in ("starts", "finishes"))
    assert [len(starts[run_id]) for run_id in run_ids()] == [2, 2, 1, 1, 1, 1]
    assert [len(finishes[run_id]) for run_id in run_ids()] == [0, 0, 1, 1, 1, 1]
    for order in ("crash", "boom"):
        (folders[1] / order).unlink()
    assert ray_sweep(folders).failures == {}
    assert_one_result_per_run(folders)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"address": "127.0.0.1:1"}, "--engine.address = '127.0.0.1:1': has no Ray cluster: "),
        ({"cores": "1e6"}, "--engine: CPU = 1000000.0: no node has so much of it: at most "),
        ({"resources": "TPU=4"}, "--engine: TPU = 4.0: no node has so much of it: at most 0"),
        ({"resources": "TPU"}, "--engine.resources = 'TPU': must be names and numbers"),
        ({"cores": "0"}, "--engine.cores = 0.0: must be greater than 0"),
    ],
)
def test_bad_input_is_one_line_before_the_plan_is_claimed(folders, texts, reason):
    with pytest.raises(InputError) as caught:
        ray_sweep(folders, **texts)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
    assert not folders[0].exists()


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def launch(folders, address: str) -> subprocess.Popen:
    arguments = [str(CONFIG), str(folders[0]), str(folders[1]), address, *GRID]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def actors() -> list[int]:
    """Returns the process ids of the actors on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_bytes().startswith(b"ray::Holder"):
                found.append(int(path.parent.name))
    return found


def counts(folders, name: str) -> list[int]:
    return [len(path.read_text().split()) for path in folders[0].glob(f"runs/*/{name}")]


@pytest.mark.engines
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_sweep_and_its_actors(folders, cluster, number):
    (folders[1] / "seconds").write_text("60")
    launcher = launch(folders, cluster.address)
    wait_until(lambda: len(counts(folders, "starts")) == 4, 120)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=120)
    assert errors.splitlines()[-1].endswith(f"Stopped: {number.name}".encode())
    wait_until(lambda: not actors(), 30)


@pytest.mark.engines
def test_kills_a_lost_node_and_a_lost_launcher_leave_one_result_per_run(folders, cluster, tmp_path):
    (folders[1] / "seconds").write_text("1")
    launcher, node, rng = (
        launch(folders, cluster.address),
        next(iter(cluster.worker_nodes)),
        random.Random(0),
    )
    kills, relaunched, deadline = 0, False, time.monotonic() + 900
    wait_until(lambda: counts(folders, "starts"), 120)
    while launcher.poll() is None:
        assert time.monotonic() < deadline
        finished, living = len(counts(folders, "finishes")), actors()
        if kills < KILLS and living:
            os.kill(rng.choice(living), signal.SIGKILL)
            kills += 1
        if finished > 15 and node is not None:
            cluster.remove_node(node)
            node = None
        if finished > 30 and not relaunched:
            launcher.kill()
            launcher.communicate()
            launcher, relaunched = launch(folders, cluster.address), True
        time.sleep(1.0)
    output, errors = launcher.communicate()
    assert output.split() == [b"60", b"0"], errors.decode()
    assert (kills, node, relaunched) == (KILLS, None, True)
    assert max(counts(folders, "starts")) > 1 and max(counts(folders, "finishes")) == 1

    local = tmp_path / "local"
    (folders[1] / "seconds").write_text("0")
    run((local, folders[1]), load(str(CONFIG), GRID), Local(2))
    results = sorted(local.glob("runs/*/result.json"))
    assert len(results) == 60
    for path in results:
        assert (folders[0] / path.relative_to(local)).read_bytes() == path.read_bytes()
