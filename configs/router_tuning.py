"""Lets tokens skip the attention of half of a pretrained model's blocks; trains routers only.

Prepare text with the model's tokenizer, then tune:

    modjax data prepare --tokenizer=PATH --data-dir=work/data
    modjax tune --pretrained=PATH --config=configs/router_tuning.py --workdir=work/tuned \\
        --data-dir=work/data

PATH is a folder with config.json and safetensors, or a GGUF file; both commands need the same PATH.
`modjax tune` prints the name of the file that holds the trained routers. Put Skip(...) around
another sublayer, or around the whole block, to skip that. To stay close to the base, rather than to
predict the next token, pass --config.train.objective=base.
"""

import ml_collections

from modjax import Seq, Skip
from modjax.data.codecs.files import tokenizer_name
from modjax.pretrained import model_fields, pretrained_spec

# The blocks to route, such as ATTENTION = [...] as `modjax tune --measure-layers` prints it. None
# takes the second half without the last block, as Router-Tuning does (arXiv 2410.13184).
ATTENTION = None


def get_config(path):
    depth = pretrained_spec(path).num_layers
    chosen = range(depth // 2 - 1, depth - 1) if ATTENTION is None else ATTENTION

    def layer(i, block):
        attention, mlp = block.parts
        return Seq(Skip(attention, capacity=0.5), mlp) if i in chosen else block

    config = ml_collections.ConfigDict()
    config.model = model_fields(path, layer)
    config.train = {
        "batch_size": 2,
        "seq_len": 256,
        "steps": 120,
        "learning_rate": 3e-3,
        "warmup_steps": 4,
        "weight_decay": 0.0,
        "eval_sequences": 64,
        "trained": "routers",
    }
    config.data = {"name": "stdlib", "vocab": f"{tokenizer_name(path)}.json", "max_epochs": 1.0}
    config.execution = {"log_every": 5}
    config.base = path
    return config
