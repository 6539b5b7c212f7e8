"""The options of the command line that several verbs share, by name."""

import os
from pathlib import Path
from typing import Any


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(os.environ.get("MODJAX_DATA") or os.path.join(base, "modjax"))


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "config": (
        "--config",
        {
            "required": True,
            "metavar": "FILE.py[:ARGUMENT]",
            "help": "the experiment; override its values with --config.GROUP.FIELD=VALUE",
        },
    ),
    "workdir": ("--workdir", {"required": True, "type": Path, "help": "where the runs are kept"}),
    "data_dir": (
        "--data-dir",
        {
            "type": Path,
            "default": _default_data_dir(),
            "help": "where token caches are kept, a folder or a bucket such as gs://BUCKET/FOLDER; "
            "default $MODJAX_DATA, else modjax in the user's data folder ($XDG_DATA_HOME)",
        },
    ),
    "jobs": (
        "--jobs",
        {
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "worker processes, which share the cores evenly (default 1); small models are "
            "fastest with one per core, an accelerator takes 1",
        },
    ),
    "loss": (
        "--loss",
        {
            "choices": ("causal", "trained"),
            "default": "causal",
            "help": "compare arms by their loss under routing that never looks ahead (causal, the "
            "default; a dense run's is its loss), or by that of all runs as they were trained",
        },
    ),
    "size": (
        "--size",
        {
            "choices": ("non_embedding", "total", "active"),
            "default": "non_embedding",
            "help": "which parameters a model's size counts: active ones are those that a token "
            "uses (default non_embedding)",
        },
    ),
    "slack": (
        "--slack",
        {
            "type": float,
            "metavar": "X",
            "help": "a routed block has room for X times its capacity; the rest passes it by and "
            "is counted; default: room for all",
        },
    ),
    "imports": (
        "--imports",
        {
            "action": "append",
            "default": [],
            "metavar": "FILE.py|MODULE",
            "help": "import this first, which registers layers of the runs; may be given again. "
            "What a run's folder names is not imported",
        },
    ),
    "other_code": (
        "--other-code",
        {
            "action": "store_true",
            "help": "continue, or read, runs that other code or another environment began; the "
            "record of a continued run says so",
        },
    ),
    "json": ("--json", {"action": "store_true", "help": "print JSON"}),
}
