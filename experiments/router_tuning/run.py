"""Tunes and scores every cell, and trains MoD; what is done is not done again.

Command   python experiments/router_tuning/run.py --pretrained=PATH --work=work/router_tuning
          [--only CELL ...]
Before    texts.py; `modjax data prepare --text work/router_tuning/texts/tune.jsonl --name tune
          --tokenizer=PATH --data-dir=work/router_tuning/data`; layers.txt, as `modjax tune
          --measure-layers` prints it; tasks/lambada.jsonl.gz, as texts.py names it
Cost      10 to 15 minutes a cell on 2 idle cores
Writes    results/CELL/KIND.json and tuned-TASK.json beside this file, as `modjax score --json`,
          and the tuned routers.safetensors
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from controls import KINDS, write

from modjax.pretrained.tensors import by_number

HERE = Path(__file__).resolve().parent
TASKS = {"lambada": 250, "piqa": 250, "arc_easy": 150}  # documents of each
MAIN = "attention-token-75"
TEXTS = ("books", "speeches", "passages")
ATTENTION = "inner=attention unit=token capacity=0.75"
CELLS = {
    "attention-token-75": ATTENTION,
    "attention-token-50": "inner=attention unit=token capacity=0.5",
    "attention-token-75-base": f"{ATTENTION} objective=base",
    "attention-sequence-75": "inner=attention unit=sequence capacity=0.75",
    "attention-token-75-seed1": f"{ATTENTION} seed=1",
    "attention-token-75-seed2": f"{ATTENTION} seed=2",
    "mlp-token-75": "inner=mlp unit=token capacity=0.75",
    "block-token-75": "inner=block unit=token capacity=0.75",
    "attention-token-published": f"{ATTENTION} rule=mindskip",
    "attention-sequence-published": "inner=attention unit=sequence capacity=0.75 rule=mindskip",
    "attention-token-75-routed": f"{ATTENTION} keys=routed",
    "attention-sequence-50": "inner=attention unit=sequence capacity=0.5",
    "mlp-token-50": "inner=mlp unit=token capacity=0.5",
    "block-token-50": "inner=block unit=token capacity=0.5",
    "mlp-sequence-75": "inner=mlp unit=sequence capacity=0.75",
    "block-sequence-75": "inner=block unit=sequence capacity=0.75",
}

MODS = {  # name -> stage of mod.py; the run that a second stage starts from
    "mod-50-routers": ("capacity=0.5 trained=routers", None),
    "mod-50-all": ("capacity=0.5 trained=all", "mod-50-routers"),
    "mod-12-routers": ("capacity=0.125 trained=routers", None),
    "mod-12-all": ("capacity=0.125 trained=all", "mod-12-routers"),
}


def call(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "modjax.cli", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode()


def chosen(work: Path, kind: str) -> list[int]:
    """Returns the numbers of the blocks whose `kind` costs the least to drop, least first."""
    lines = re.findall(rf"^{kind} +([0-9]+) ", (work / "layers.txt").read_text(), re.M)
    return [int(line) for line in lines[: len(lines) // 2]]


def scored(*options: str) -> list[dict[str, Any]]:
    """Returns what `modjax score` prints, with the names of files in place of their paths."""
    found = json.loads(call("score", "--json", *options))
    return [one | {"name": Path(one["name"]).name} for one in found]


def score(args: argparse.Namespace, out: Path, files: list[Path], name: str, *options: str) -> None:
    """Writes the scores of routers files, each to out/NAME, with the file's name in place of *."""
    if all((out / name.replace("*", file.stem)).exists() for file in files):
        return
    imports = ("--imports", str(HERE / "controls.py"))
    of = (f"--pretrained={args.pretrained}", *imports, "--routers", *map(str, files))
    found = scored(*options, *of)
    for file in files:
        scores = [one | {"routers": file.stem} for one in found if one["routers"] == str(file)]
        (out / name.replace("*", file.stem)).write_text(json.dumps(scores) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*CELLS, *MODS), default=(*CELLS, *MODS))
    args = parser.parse_args()
    texts = ["--seq-len=256", "--text", *(f"{args.work}/texts/{name}.jsonl" for name in TEXTS)]
    shared = f"--data-dir={args.work / 'data'}"
    for name in (name for name in args.only if name in CELLS):
        cell, out, files = CELLS[name], HERE / "results" / name, args.work / "runs" / name
        order = chosen(args.work, cell.split()[0].removeprefix("inner="))
        numbers = sorted(order)
        tune = ("tune", f"--pretrained={args.pretrained}", f"--config={HERE / 'config.py'}")
        tune += (f"--workdir={files}", shared)
        if not list(files.glob("runs/*/routers.safetensors")):
            call(*tune, CELL=f"{cell} layers={','.join(map(str, numbers))}")
        (routers,) = files.glob("runs/*/routers.safetensors")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(routers, out)
        score(args, out, [routers], "tuned.json", *texts)
        for task, limit in TASKS.items():
            options = ("--tasks", f"{args.work}/tasks/{task}.jsonl.gz", f"--limit={limit}")
            if task == "lambada" or name == MAIN:
                score(args, out, [routers], f"tuned-{task}.json", *options)
        scores = {one["name"]: one for one in json.loads((out / "tuned.json").read_text())}
        layers = scores["pooled"]["layers"]
        names = sorted((name for name in layers if name != "all"), key=by_number)
        shares = [layers[name]["skip_capacity"] for name in names]
        controls = args.work / "controls" / name
        if not controls.exists():
            places = [numbers.index(number) for number in order]
            write(Path(args.pretrained), routers, shares, places, controls)
        score(args, out, [controls / f"{kind}.safetensors" for kind in KINDS], "*.json", *texts)
        print(f"{name}: done", flush=True)
    for name in (name for name in args.only if name in MODS):
        stage, first = MODS[name]
        out, files = HERE / "results" / name, f"--workdir={args.work / 'runs' / name}"
        if first is not None:
            (base,) = (args.work / "runs" / first / "runs").iterdir()
            stage += f" base={base}"
        out.mkdir(parents=True, exist_ok=True)
        call("train", f"--config={HERE / 'mod.py'}:{args.pretrained}", files, shared, STAGE=stage)
        if not (out / "scored.json").exists():
            found = scored(files, shared, *texts)
            (out / "scored.json").write_text(json.dumps(found) + "\n")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
