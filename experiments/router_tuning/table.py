"""Prints the table of README.md from the files in results/.

Command   python experiments/router_tuning/table.py
"""

import json
from pathlib import Path

import numpy as np

from modjax.finished.paired import compare

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("tuned", "random", "pattern", "mean")


def read(cell: Path, kind: str, task: str = "") -> dict:
    """Returns the last score of a file: the pooled texts, or the task."""
    file = cell / f"{kind}{task}.json"
    return json.loads(file.read_text())[-1] if file.exists() else {}


def interval(estimate: list) -> str:
    value, low, high = estimate.values() if isinstance(estimate, dict) else estimate
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def against(ours: dict, theirs: dict) -> str:
    """Returns how much smaller our loss is than that of a control, on the same blocks of text."""
    if not theirs:
        return ""
    pair = [np.array(one["units"]["nats"]) for one in (ours, theirs)]
    return interval(compare(pair, np.array(ours["units"]["weight"]))["difference"]._asdict())


def main() -> None:
    print(
        "| cell | ran | variance | loss - base | random | pattern | mean | tuned - random |", end=""
    )
    print(" LAMBADA nats | greedy, points |")
    print("|---" * 10 + "|")
    for cell in sorted(RESULTS.iterdir()):
        found = {kind: read(cell, kind) for kind in KINDS}
        tuned, last = found["tuned"], read(cell, "tuned", "-lambada")
        if not tuned:
            continue
        ran = tuned["layers"]["all"]
        columns = [cell.name, f"{ran['skip_capacity']:.3f}", f"{ran['skip_variance']:.3f}"]
        columns.append(interval(tuned["measures"]["nats"]["difference"]))
        for kind in KINDS[1:]:
            one = found[kind]
            columns.append(f"{one['measures']['nats']['difference']['value']:+.3f}" if one else "")
        columns.append(against(tuned, found["random"]))
        if last:
            columns.append(interval(last["measures"]["nats"]["difference"]))
            greedy = last["measures"]["greedy"]["difference"]
            columns.append(interval({k: 100 * v for k, v in greedy.items()}))
        print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
