"""launch/slurm/sweep.sh, with a stand-in for modjax."""

import json
import os
import subprocess
import sys
from pathlib import Path

from modjax.scaling.engines.engine import options_of
from modjax.scaling.engines.slurm import Slurm

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "sweep.sh"
STAND_IN = f"#!{sys.executable} -IS\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def test_each_value_is_one_argument_and_every_option_is_known(tmp_path):
    (tmp_path / "modjax").write_text(STAND_IN)
    (tmp_path / "modjax").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given = ["my config.py", "$(touch X)", "it's", "--config.a.b=c d"]
    called = subprocess.run(["sh", SCRIPT, *given], env=environment, capture_output=True, text=True)
    verb, *arguments = json.loads(called.stdout)
    assert (verb, arguments[0]) == ("sweep", "--engine=slurm")
    assert arguments[1:4] == ["--config=my config.py", "--workdir=$(touch X)", "--data-dir=it's"]
    assert arguments[4] == "--config.a.b=c d"
    fields = dict(a.removeprefix("--engine.").split("=", 1) for a in arguments[5:])
    assert fields["time"] == "4:00:00" and fields["more"] == "--nice=100"
    assert isinstance(options_of("slurm", fields), Slurm)


def test_a_missing_argument_is_named():
    called = subprocess.run(["sh", SCRIPT, "config.py"], capture_output=True, text=True)
    assert called.returncode != 0 and "WORKDIR" in called.stderr
