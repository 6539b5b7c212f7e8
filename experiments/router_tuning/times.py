"""Measures the prefill of 2,048 tokens of a book with every cell's routers, against the base.

Command   python experiments/router_tuning/times.py --pretrained=PATH --work=work/router_tuning
Cost      20 minutes on 2 cores with nothing beside it
Writes    results/times.json: name -> seconds of each round, and the median ratio to the base
"""

import argparse
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from controls import KINDS  # registers the routers of the controls
from flax import nnx

from modjax.bench.step import interleaved, ratio
from modjax.nn import unstack
from modjax.pretrained import from_pretrained

HERE = Path(__file__).resolve().parent
LENGTH, ROUNDS = 2048, 3


def prefilling(model, tokens_BL):
    """Returns a step that reads a prompt, up to the logits of its last token."""
    graphdef, weights = unstack(model.graphdef, model.weights)

    def prefill(weights):
        read = nnx.merge(graphdef, weights).reader(max_length=LENGTH, routing="causal")
        return read(tokens_BL, jnp.full(1, LENGTH), None)[:2]

    compiled = jax.jit(prefill)
    return lambda: jax.block_until_ready(compiled(weights))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    base = from_pretrained(args.pretrained)
    lines = (args.work / "texts" / "books.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    tokens_BL = jnp.asarray(base.tokenizer.prompt(text, "text")[:LENGTH], np.int32)[None]
    steps = {"base": prefilling(base, tokens_BL)}
    for routers in sorted((HERE / "results").glob("*/routers.safetensors")):
        out = routers.parent
        files = {out.name: routers}
        if out.name in ("attention-token-75", "attention-token-50", "mlp-token-75"):
            static = args.work / "controls" / out.name / f"{KINDS[-1]}.safetensors"
            files[f"{out.name}, static"] = static
        for name, file in files.items():
            if file.exists():
                steps[name] = prefilling(from_pretrained(args.pretrained, routers=file), tokens_BL)
    seconds = interleaved(steps, rounds=ROUNDS)
    found = {
        name: {"seconds": taken, "ratio": ratio(seconds, name, "base")}
        for name, taken in seconds.items()
    }
    (HERE / "results" / "times.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, one in found.items():
        print(f"{name}: {one['ratio']:.3f} of {statistics.median(seconds['base']):.2f} s")


if __name__ == "__main__":
    main()
