"""Tunes and scores every cell of the table, one after another; what is done is not done again.

Command   python experiments/router_tuning/run.py --pretrained=PATH --work=work/router_tuning
Before    texts.py; `modjax data prepare --text work/router_tuning/texts/tune.jsonl --name tune
          --tokenizer=PATH --data-dir=work/router_tuning/data`; layers.txt, as `modjax tune
          --measure-layers` prints it; tasks/lambada.jsonl.gz, as texts.py names it
Cost      about 10 minutes a cell on 2 idle cores
Writes    results/CELL/KIND.json and KIND-lambada.json beside this file, as `modjax score --json`
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from controls import KINDS, write

from modjax.pretrained.tensors import by_number

HERE = Path(__file__).resolve().parent
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


def call(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "modjax.cli", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode()


def chosen(work: Path, kind: str) -> list[int]:
    """Returns the numbers of the blocks whose `kind` costs the least, in ascending order."""
    said = re.search(rf"^{kind.upper()} = (.*)$", (work / "layers.txt").read_text(), re.M)
    assert said is not None
    return json.loads(said[1])


def score(work: Path, pretrained: str, out: Path, kind: str, routers: Path) -> None:
    shared = ("score", f"--pretrained={pretrained}", f"--routers={routers}", "--json")
    shared += ("--imports", str(HERE / "controls.py"))
    files = {
        f"{kind}.json": [
            "--seq-len=256",
            "--text",
            *(f"{work}/texts/{name}.jsonl" for name in TEXTS),
        ],
    }
    if kind == "tuned":
        task = ["--tasks", f"{work}/tasks/lambada.jsonl.gz", "--limit=250"]
        files["tuned-lambada.json"] = task
    for name, options in files.items():
        if not (out / name).exists():
            found = call(*shared, *options)
            (out / name).write_text(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name, cell in CELLS.items():
        out, files = HERE / "results" / name, args.work / "runs" / name
        kind = cell.split()[0].removeprefix("inner=")
        layers = ",".join(map(str, chosen(args.work, kind)))
        tune = ("tune", f"--pretrained={args.pretrained}", f"--config={HERE / 'config.py'}")
        tune += (f"--workdir={files}", f"--data-dir={args.work / 'data'}")
        if not list(files.glob("runs/*/routers.safetensors")):
            call(*tune, CELL=f"{cell} layers={layers}")
        (routers,) = files.glob("runs/*/routers.safetensors")
        out.mkdir(parents=True, exist_ok=True)
        score(args.work, args.pretrained, out, "tuned", routers)
        scores = {one["name"]: one for one in json.loads((out / "tuned.json").read_text())}
        layers = scores["pooled"]["layers"]
        names = sorted((name for name in layers if name != "all"), key=by_number)
        shares = [layers[name]["skip_capacity"] for name in names]
        controls = args.work / "controls" / name
        if not controls.exists():
            write(Path(args.pretrained), routers, shares, controls)
        for control in KINDS:
            score(args.work, args.pretrained, out, control, controls / f"{control}.safetensors")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
