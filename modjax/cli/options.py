"""The options that several verbs of the command line share."""

import os
from pathlib import Path
from typing import Any

Option = tuple[str, dict[str, Any]]


def option(flag: str, **keywords: Any) -> Option:
    """Returns the arguments of `argparse.ArgumentParser.add_argument`."""
    return flag, keywords


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(os.environ.get("MODJAX_DATA") or os.path.join(base, "modjax"))


CONFIG = option(
    "--config",
    required=True,
    metavar="FILE.py[:ARGUMENT]",
    help="the experiment, whose get_config is called with ARGUMENT; override its values with "
    "--config.GROUP.FIELD=VALUE",
)
WORKDIR = option("--workdir", required=True, type=Path, help="the folder of the runs")
DATA_DIR = option(
    "--data-dir",
    type=Path,
    default=_default_data_dir(),
    help="the folder of the token caches, or a bucket such as gs://BUCKET/FOLDER; default "
    "$MODJAX_DATA, else modjax in the user's data folder ($XDG_DATA_HOME)",
)
JOBS = option(
    "--jobs",
    type=int,
    default=1,
    metavar="N",
    help="worker processes, which share the cores evenly (default 1); small models are fastest "
    "with one per core, an accelerator takes 1",
)
LOSS = option(
    "--loss",
    choices=("causal", "trained"),
    default="causal",
    help="compare arms by their loss under routing that never looks ahead (causal, the default; "
    "for a dense run, its only loss), or by the loss of all runs as trained",
)
SIZE = option(
    "--size",
    choices=("non_embedding", "total", "active"),
    default="non_embedding",
    help="the parameters that count as a model's size; a token uses the active ones (default "
    "non_embedding)",
)
ROUTERS = option(
    "--routers",
    type=Path,
    metavar="FILE",
    help="the routers file of `modjax tune` that belongs to --pretrained",
)
SLACK = option(
    "--slack",
    type=float,
    metavar="X",
    help="give a routed block cache slots for X times its capacity; tokens beyond them skip the "
    "block and are counted; default: slots for all",
)
IMPORTS = option(
    "--imports",
    action="append",
    default=[],
    metavar="FILE.py|MODULE",
    help="first import this file or module, which registers layers of the runs; may be repeated. "
    "Nothing that a run's folder names is imported",
)
OTHER_CODE = option(
    "--other-code",
    action="store_true",
    help="continue, or read, runs of other code or of another environment; the record of a "
    "continued run says so",
)
JSON = option("--json", action="store_true", help="print JSON")
RUN_OF_PLAN = option("--run", metavar="RUN_ID", help="the run of the sweep's plan")
