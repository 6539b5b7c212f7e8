#!/usr/bin/env python3
"""A stand-in for Slurm's programs: starts every task at once, and keeps all state in files.

A task that is queued again waits for two seconds.

Its first argument is the name of a program. $SLURM_STAND_IN has a folder for
each array, with the files N.status (the exit status of task N, once it has ended), N.pid, and
N.state, by which a test overrides what squeue says. Files for orders:

  refuse      what sbatch --test-only says when it refuses
  busy        what every program says while it does not answer
  called      gets every command
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["SLURM_STAND_IN"])
TASK = """
touch {task}.again
while [ -e {task}.again ]; do
  rm {task}.again
  bash {script} >> {log} 2>&1
  code=$?
  [ -e {task}.again ] && sleep 2
done
echo $code > {task}.status
"""


def option(name: str, arguments: list[str]) -> str:
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")), "")


def begin(folder: Path, number: str, log: str) -> None:
    log = shlex.quote(log.replace("%a", number).replace("%%", "%"))
    task, own = shlex.quote(str(folder / number)), shlex.quote(str(folder / "script"))
    script = TASK.format(task=task, script=own, log=log)
    ids = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_JOB_ID": folder.name}
    process = subprocess.Popen(
        ["bash", "-c", script],
        env=os.environ | ids,
        stdout=subprocess.DEVNULL,  # else its caller would wait for the end of it
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    (folder / f"{number}.pid").write_text(str(process.pid))


def sbatch(arguments: list[str]) -> None:
    if "--test-only" in arguments:
        if (HOME / "refuse").exists():
            sys.exit((HOME / "refuse").read_text())
        return
    folder = HOME / option("job-name", arguments)
    folder.mkdir()
    (folder / "script").write_text(sys.stdin.read())
    first, last = option("array", arguments).split("-")
    for number in range(int(first), int(last) + 1):
        begin(folder, str(number), option("output", arguments))


def squeue(arguments: list[str]) -> None:
    print("COMPLETED|N/A|0|None|a job | of another kind|")
    for folder in filter(Path.is_dir, HOME.iterdir()):
        for file in folder.glob("*.pid"):
            status, state = (file.with_suffix(f".{kind}") for kind in ("status", "state"))
            code = int(status.read_text() or 0) if status.exists() else 0
            said = ("FAILED" if code else "COMPLETED") if status.exists() else "RUNNING"
            said = "PENDING" if file.with_suffix(".again").exists() else said
            said = state.read_text() if state.exists() else said
            code = code - 128 if code > 128 else code << 8  # as of wait
            print(f"{said}|{file.stem}|{code}|None|{folder.name}|")


def scancel(arguments: list[str]) -> None:
    if option("state", arguments) == "PENDING":
        for file in (HOME / option("name", arguments)).glob("*.again"):
            file.unlink()
        return
    sent = signal.SIGUSR2 if option("signal", arguments) == "USR2" else signal.SIGKILL
    for file in (HOME / option("name", arguments)).glob("*.pid"):
        if not file.with_suffix(".status").exists():
            children = subprocess.run(
                ["pgrep", "-P", file.read_text().strip()], capture_output=True
            )
            for pid in children.stdout.split():
                os.kill(int(pid), sent)


def scontrol(arguments: list[str]) -> None:
    name, _, number = arguments[1].rpartition("_")
    (HOME / name / f"{number}.again").touch()


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    if (HOME / "busy").exists():
        sys.exit((HOME / "busy").read_text())
    with open(HOME / "called", "a") as called:
        called.write(shlex.join(sys.argv[1:]) + "\n")
    globals()[program](arguments)
