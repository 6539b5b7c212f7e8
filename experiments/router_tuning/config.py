"""Router tuning of one cell of the table: what may be skipped, how, and how much.

run.py calls it. The cell is in the environment variable CELL, as in "inner=mlp capacity=0.75".
"""

import os

import ml_collections

from modjax import MLP, Attention, Centred, First, MindSkip, Quantile, Seq, Skip, Zero
from modjax.pretrained import model_fields

SETTINGS = {
    "inner": "attention",  # or mlp, block
    "unit": "token",  # or sequence
    "keys": "all",  # or routed
    "capacity": "0.5",
    "rule": "quantile",  # or mindskip
    "layers": "",  # numbers with commas between; none takes the second half, without the last
    "objective": "next_token",  # or base
    "steps": "120",
    "seed": "0",
}


def get_config(path):
    chosen = SETTINGS | dict(one.split("=") for one in os.environ.get("CELL", "").split())
    published = chosen["rule"] == "mindskip"
    about = {
        "capacity": float(chosen["capacity"]),
        "unit": chosen["unit"],
        "keys": chosen["keys"],
        "router": Zero() if published else Centred(),
        "rule": MindSkip() if published else Quantile(),
        "causal": First(32),
    }
    numbers = [int(n) for n in chosen["layers"].split(",") if n] or list(range(14, 29))

    def layer(i, block):
        if i not in numbers:
            return block
        if chosen["inner"] == "block":
            return Skip(block, **about)
        kind = {"attention": Attention, "mlp": MLP}[chosen["inner"]]
        return Seq(*(Skip(p, **about) if isinstance(p, kind) else p for p in block.parts))

    config = ml_collections.ConfigDict()
    config.model = model_fields(path, layer)
    steps = int(chosen["steps"])
    config.train = {
        "batch_size": 2,
        "seq_len": 256,
        "steps": steps,
        "learning_rate": 3e-3,
        "warmup_steps": max(1, steps * 3 // 100),
        "final_learning_rate_fraction": 0.0,
        "weight_decay": 0.0,
        "eval_sequences": 8,
        "trained": "routers",
        "seed": int(chosen["seed"]),
    }
    if chosen["objective"] != "next_token":
        config.train.objective = chosen["objective"]
    config.data = {"name": "tune", "vocab": "smollm2.json", "seed": int(chosen["seed"])}
    config.execution = {"log_every": 5}
    config.base = path
    return config
