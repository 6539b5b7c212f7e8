"""launch/tpu_slice.sh, with a stand-in for gcloud that runs the command in its own shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_slice.sh"
# Records its arguments; as gcloud it then runs the command, as a host's shell would.
STAND_IN = f"""#!{sys.executable} -IS
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["SEEN"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + chr(10))
if name == "modjax" and sys.argv[1] == "plan":
    print(json.dumps([dict(run_id="a-1"), dict(run_id="b-2")]))
if name == "gcloud":
    command = sys.argv[-1].removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command]).returncode)
"""


@pytest.fixture
def launch(tmp_path):
    """Runs the script in an empty folder; returns its outcome and every call of a stand-in."""
    programs, here = tmp_path / "programs", tmp_path / "here"
    programs.mkdir()
    here.mkdir()
    for name in ("gcloud", "modjax"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    seen = tmp_path / "seen"
    environment = {k: v for k, v in os.environ.items() if k != "DATA_DIR"}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen)}

    def run(*arguments: str, **more: str):
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=environment | more,
            cwd=here,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert list(here.iterdir()) == [], "something else was run"
        lines = seen.read_text().splitlines() if seen.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


HOSTILE = [
    "c.py; touch X #",
    "$(touch X)",
    "`touch X`",
    "a && touch X",
    'it\'s "quoted" \\ and * spaced  twice',
    "'; touch X; '",
    '"; touch X; "',
    "two\nlines; touch X",
    "*",
    "~",
    "ü 日本",
    "!! {a,b} $HOME",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_every_value_arrives_as_one_argument_and_runs_nothing(launch, value):
    overrides = ["--config.train.seed=1", f"--config.data.name={value}"]
    done, calls = launch("slice", "zone-a", f"c{value}", f"w{value}", *overrides, DATA_DIR=value)
    assert (done.returncode, done.stderr) == (0, "")
    assert calls[0][:-1] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "slice",
        "--zone=zone-a",
        "--worker=all",
    ]
    config = [f"--config=c{value}", *overrides, f"--data-dir={value}"]
    assert calls[1] == ["modjax", "plan", *config, "--json"]
    assert calls[2:] == [
        ["modjax", "train", "--distributed", *config, f"--run={run}", f"--workdir=w{value}"]
        for run in ("a-1", "b-2")
    ]


@pytest.mark.parametrize("field", range(4))
def test_a_hostile_value_in_one_place_runs_nothing(launch, field):
    values = ["c.py", "w", "d", "1"]
    values[field] = "c.py; touch X #"
    config, workdir, data_dir, seed = values
    done, calls = launch(
        "slice", "zone-a", config, workdir, f"--config.seed={seed}", DATA_DIR=data_dir
    )
    assert done.returncode == 0 and len(calls) == 4


def test_without_overrides_none_is_passed(launch):
    done, calls = launch("slice", "zone-a", "c.py", "w", DATA_DIR="gs://bucket/d")
    assert done.returncode == 0
    assert calls[1] == ["modjax", "plan", "--config=c.py", "--data-dir=gs://bucket/d", "--json"]


@pytest.mark.parametrize(
    ("arguments", "data_dir", "reason"),
    [
        ([], "d", "needs NAME, ZONE, CONFIG and WORKDIR"),
        (["slice", "zone-a", "c.py"], "d", "needs NAME, ZONE, CONFIG and WORKDIR"),
        (["slice", "zone-a", "c.py", "w"], None, "needs DATA_DIR"),
        (["slice", "zone-a", "c.py", "w"], "", "needs DATA_DIR"),
        (["slice", "", "c.py", "w"], "d", "'' is no NAME, ZONE, CONFIG or WORKDIR"),
        (["--help", "zone-a", "c.py", "w"], "d", "'--help' is no NAME"),
        (["slice", "zone-a", "c.py", "--config.a=1"], "d", "'--config.a=1' is no NAME"),
        (["slice", "zone-a", "c.py", "w", "x"], "d", "'x' is no --config.a.b=value"),
        (["slice", "zone-a", "c.py", "w", "--jobs=2"], "d", "'--jobs=2' is no --config.a.b=value"),
    ],
)
def test_what_is_missing_or_no_argument_is_said_and_nothing_is_started(
    launch, arguments, data_dir, reason
):
    done, calls = launch(*arguments, **({} if data_dir is None else {"DATA_DIR": data_dir}))
    said, usage = done.stderr.splitlines()
    assert done.returncode == 2 and calls == [] and done.stdout == ""
    assert said.startswith(f"launch/tpu_slice.sh: {reason}")
    assert usage.startswith("usage: DATA_DIR=DIR launch/tpu_slice.sh NAME ZONE CONFIG WORKDIR")
