"""A worker process that is started by hand, and its messages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def settings(workdir: Path, job: str, imports: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "cpus": [],
        "job": job,
        "workdir": str(workdir),
        "data_dir": str(workdir.parent),
        "fingerprint": "f",
        "execution": {},
        "imports": imports or {},
        "code": {},
        "other_code": False,
    }


def worker_says(
    settings: dict[str, Any], order: bytes = b"", **environment: str
) -> tuple[list[dict[str, Any]], bytes]:
    """Returns the messages of a worker that gets one order, and what it printed on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "modjax.scaling.workers.worker"],
        input=json.dumps(settings).encode() + b"\n" + order,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr
