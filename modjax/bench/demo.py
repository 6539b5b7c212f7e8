"""`make demo` from a clean clone, install included, with nothing cached from earlier runs."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from modjax.bench import Row, call, fill, fresh_environment

REPOSITORY = Path(__file__).resolve().parents[2]
ARMS = ("dense", "mod12")
ROWS = (
    Row("make demo from a clean clone", "minutes", 12.0),
    Row("make demo: budgets with the vertex of both arms inside the range", "budgets", 2, "higher"),
)


def measure() -> list[Row]:
    if not (REPOSITORY / ".git").exists():
        raise FileNotFoundError("modjax does not run from a clone")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = fresh_environment(folder)
        clone = folder / "modjax"
        call(["git", "clone", "-q", str(REPOSITORY), str(clone)], environment)
        start = time.perf_counter()
        call(["make", "demo", "WORK=work/tiny"], environment, cwd=clone)
        minutes = (time.perf_counter() - start) / 60
        fits = json.loads((clone / "work" / "tiny" / "fit.json").read_bytes())
    return fill(ROWS, [minutes, budgets_with_vertices_inside(fits)])


def budgets_with_vertices_inside(fits: dict[str, Any]) -> int:
    """Returns the number of budgets at which both arms' fitted optimum is in the sampled range.

    fits: the content of a fit.json.
    """
    inside = {
        (p["arm"], p["budget_flops"])
        for p in fits["parabolas"]
        if p["quantity"] == "parameters"
        and p["optimum"] is not None
        and p["low"] <= p["optimum"] <= p["high"]
    }
    return sum(all((arm, budget) in inside for arm in ARMS) for budget in fits["budgets"])
