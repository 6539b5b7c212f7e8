"""One MoD model of eight layers, whose routing is looked at afterwards.

Command   modjax train --config=configs/fig5_routing.py --workdir=work/fig5
          with --config.data.name=english for text that was prepared under that name
Cost      see experiments/fig5_routing/README.md
Expected  as there
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {
        "vocab_size": 272,
        "d_model": 96,
        "num_layers": 8,
        "num_heads": 6,
        "num_kv_heads": 6,
        "d_ff": 384,
        "layers": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())",
    }
    config.train = {
        "batch_size": 16,
        "seq_len": 256,
        "steps": 600,
        "learning_rate": 0.0083,
        "warmup_steps": 30,
        "b2": 0.98,
        "eval_sequences": 256,
    }
    config.data = {"name": "stdlib", "vocab": "bytes"}
    config.execution = {"log_every": 20}
    return config
