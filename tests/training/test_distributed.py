"""One run over two processes of this machine, started as by Slurm."""

import collections
import json
import socket
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "single.py"
OVERRIDES = [
    "data.name=tiny",
    "model.d_model=32",
    "model.d_ff=64",
    "train.batch_size=8",
    "train.seq_len=64",
    "train.steps=20",
    "train.warmup_steps=2",
    "train.eval_sequences=8",
    "execution.log_every=1",
]


def lines_of(workdir: Path) -> list[dict]:
    (path,) = workdir.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def windows_of(reads: Path) -> dict[str, collections.Counter]:
    """Returns how often each window of a split was read, by the place where it starts."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for split, starts in map(json.loads, reads.read_text().splitlines()):
        found[split].update(starts)
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_one_result(modjax, tiny_data_dir, tmp_path):
    def train(workdir: Path, reads: Path, *more: str, **environment: str):
        overrides = [f"--config.{override}" for override in OVERRIDES]
        return modjax(
            "train",
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            "--json",
            f"--data-dir={tiny_data_dir}",
            f"--config.model.imports={[str(Path(__file__).with_name('reads.py'))]}",
            *overrides,
            *more,
            READS=str(reads),
            **environment,
        )

    # Two devices here as well: on one the sums round otherwise, and a router makes another choice
    # of that. test_sharding.py compares with one device.
    alone = train(tmp_path / "alone", tmp_path / "all", JAX_NUM_CPU_DEVICES="2")
    _, err = alone.communicate(timeout=120)
    assert alone.returncode == 0, err

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        train(
            tmp_path / "two",
            tmp_path / f"part-{i}",
            "--distributed",
            SLURM_JOB_ID="1",
            SLURM_STEP_NODELIST="127.0.0.1",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
            JAX_COORDINATOR_PORT=str(port),
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, printed, strict=True):
        assert process.returncode == 0, err
    said = [out.partition("{") for out, _ in printed]  # the CPU's collectives speak first
    record = json.loads("{" + said[0][2])
    assert not said[1][1], "the first process speaks for all"
    assert record["device"] == "2 x cpu"
    results = list((tmp_path / "two").glob("runs/*/result.json"))
    assert [json.loads(path.read_text())["run_id"] for path in results] == [record["run_id"]]

    expected, lines = lines_of(tmp_path / "alone"), lines_of(tmp_path / "two")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert len(lines) == 21 and lines[19]["loss"] < lines[0]["loss"] - 0.1, "it has learned"
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in line:
                assert line[name] == other[name], (name, line["step"])

    whole, *parts = (windows_of(tmp_path / name) for name in ("all", "part-0", "part-1"))
    for split in ("train", "validation"):
        assert parts[0][split] + parts[1][split] == whole[split]
        assert parts[0][split].total() == parts[1][split].total() == whole[split].total() / 2
