"""MoD around every other block of a pretrained model: routers alone, then all weights.

run.py calls it. The stage is in the environment variable STAGE, as in "capacity=0.5 trained=all
base=FOLDER": the second stage starts from the run of the first.
"""

import os

import ml_collections

from modjax import MoD, Predictor, TopK
from modjax.pretrained import model_fields

RATES = {"routers": 3e-3, "all": 1e-4}


def get_config(path):
    stage = dict(one.split("=") for one in os.environ["STAGE"].split())
    capacity, trained = float(stage["capacity"]), stage["trained"]
    # The weight of a router starts near 1, so that a routed block starts near the pretrained one.
    about = {"rule": TopK(weight="one_plus_tanh"), "causal": Predictor()}
    config = ml_collections.ConfigDict()
    config.model = model_fields(
        path, lambda i, block: MoD(block, capacity=capacity, **about) if i % 2 else block
    )
    config.train = {
        "batch_size": 2,
        "seq_len": 256,
        "steps": 120,
        "learning_rate": RATES[trained],
        "warmup_steps": 4,
        "weight_decay": 0.0,
        "eval_sequences": 16,
        "eval_every": 40,
        "trained": trained,
    }
    config.data = {"name": "tune", "vocab": "smollm2.json", "seed": 1 if trained == "all" else 0}
    config.execution = {"log_every": 5}
    config.base = stage.get("base", path)
    return config
