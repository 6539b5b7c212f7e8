"""Puts every other block of a pretrained model inside MoD. Trains the routers and predictors only.

Prepare text with the model's tokenizer, then train:

    modjax data prepare --tokenizer=PATH --data-dir=work/data
    modjax train --config=configs/pretrained.py:PATH --workdir=work/routers --data-dir=work/data

PATH is a folder with config.json and safetensors, or a GGUF file; both commands need the same PATH.
To train all weights, pass `--config.train.trained=all`. To try other layers, copy this file and
change the function below: it maps block number i to the layer in its place. A block keeps its
weights inside any layer. You can replace an MLP by MoE(...) with the same activation, norm and
width; each expert then starts as a copy of that MLP.
"""

import ml_collections

from modjax import MoD, Predictor, TopK
from modjax.data.codecs.files import tokenizer_name
from modjax.pretrained import model_fields


def get_config(path):
    config = ml_collections.ConfigDict()
    # The weight of a router starts near 1, so that a routed block starts near the pretrained one.
    rule = TopK(weight="one_plus_tanh")
    config.model = model_fields(
        path,
        lambda i, block: (
            MoD(block, capacity=0.5, rule=rule, causal=Predictor()) if i % 2 else block
        ),
    )
    config.train = {
        "batch_size": 4,
        "seq_len": 256,
        "steps": 100,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "eval_sequences": 64,
        "trained": "routers",
    }
    config.data = {"name": "stdlib", "vocab": f"{tokenizer_name(path)}.json", "max_epochs": 1.0}
    config.execution = {"log_every": 5}
    config.base = path
    return config
