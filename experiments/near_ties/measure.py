"""Losses of each run on several numbers of devices, and evaluated in batches of several sizes.

Usage: python -m experiments.near_ties.measure DATA_DIR WORKDIR
WORKDIR/N holds the sweep of configs/near_ties.py on N devices. Writes results.json.
"""

import json
import sys
from pathlib import Path

from modjax.finished.runs import compare, open_run
from modjax.records import read_records, read_spec, run_dir
from modjax.training.results import evaluate

DEVICES = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32)


def in_batches(workdir: Path, data_dir: Path, run_id: str) -> dict[str, float]:
    """Returns a run's loss as trained, for each number of sequences evaluated at once."""
    run = open_run(read_spec(run_dir(workdir, run_id), run_id), workdir=workdir, data_dir=data_dir)
    found = {}
    for size in BATCHES:
        evaluate.EVAL_BATCH = size
        found[str(size)] = compare(run, "trained", None).trained.loss
    return found


def main(data_dir: str, workdir: str) -> None:
    devices = {n: {r.run_id: r for r in read_records(Path(workdir, f"{n}"))} for n in DEVICES}
    results = [
        {
            "arm": record.variant,
            "seed": record.seed,
            "near_ties": sum(v for name, v in record.outcome.items() if name.endswith("near_ties"))
            or None,
            "devices": {str(n): devices[n][run_id].eval_loss for n in DEVICES},
            "batches": in_batches(Path(workdir, "1"), Path(data_dir), run_id),
        }
        for run_id, record in sorted(devices[1].items())
    ]
    text = json.dumps(results, indent=1)
    Path(__file__).with_name("results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
