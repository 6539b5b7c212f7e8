#!/usr/bin/env python3
"""A stand-in for kubectl and a cluster: runs the pod of every Job at once, as a process.

$KUBECTL_STAND_IN has a folder for each Job, with job.json, pid, and at the end the exit status. A
Job whose pod exits with 75 gets a new one. Files for orders:

  refuse      what `create --dry-run` says when it refuses
  busy        what every command says while the cluster does not answer
  called      gets every command
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

HOME = Path(os.environ["KUBECTL_STAND_IN"])


def option(name: str, arguments: list[str]) -> str:
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")), "")


def chosen(arguments: list[str]) -> list[Path]:
    label, values = re.fullmatch(r"(\S+?)(?:=| in )(.*)", option("selector", arguments)).groups()
    jobs, wanted = [path.parent for path in HOME.glob("*/job.json")], values.strip("()").split(",")
    return [job for job in jobs if manifest(job)["metadata"]["labels"].get(label) in wanted]


def manifest(job: Path) -> dict:
    return json.loads((job / "job.json").read_text())


def create(arguments: list[str]) -> None:
    if option("dry-run", arguments):
        if (HOME / "refuse").exists():
            sys.exit((HOME / "refuse").read_text())
        return
    file = option("filename", arguments)
    for one in yaml.safe_load_all(sys.stdin if file == "-" else open(file)):
        job = HOME / one["metadata"]["name"]
        job.mkdir()
        (job / "job.json").write_text(json.dumps(one))
        subprocess.Popen(
            [sys.executable, __file__, "run", str(job)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def run(arguments: list[str]) -> None:
    job, code = Path(arguments[0]), 75
    (container,) = manifest(job)["spec"]["template"]["spec"]["containers"]
    while code == 75 and not (job / "deleted").exists():
        process = subprocess.Popen(container["command"])
        (job / "pid").write_text(str(process.pid))
        code = process.wait()
        (job / "pid").unlink()
    if (job / "deleted").exists():
        shutil.rmtree(job)
    else:
        (job / "status").write_text(str(code if code >= 0 else 128 - code))


def get(arguments: list[str]) -> None:
    items = []
    for job in chosen(arguments):
        status, about = {"ready": int((job / "pid").exists())}, manifest(job)["metadata"]
        if (job / "status").exists():
            code = int((job / "status").read_text())
            status = {"conditions": [{"type": "Failed" if code else "Complete", "status": "True"}]}
            end = {"state": {"terminated": {"exitCode": code}}}
            pod = {"containerStatuses": [end]}
            items.append({"kind": "Pod", "metadata": about, "status": pod})
        items.append({"kind": "Job", "metadata": about, "status": status})
    print(json.dumps({"items": items}))


def delete(arguments: list[str]) -> None:
    for job in chosen(arguments):
        if (job / "status").exists():
            shutil.rmtree(job)
        elif arguments[0] == "pods":
            os.kill(int((job / "pid").read_text()), signal.SIGKILL)
        elif not (job / "deleted").exists():
            (job / "deleted").touch()
            os.kill(int((job / "pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    if (HOME / "busy").exists():
        sys.exit((HOME / "busy").read_text())
    with open(HOME / "called", "a") as called:
        called.write(shlex.join(sys.argv[1:]) + "\n")
    words = [word for word in sys.argv[1:] if not word.startswith("--namespace=")]
    globals()[words[0]](words[1:])
