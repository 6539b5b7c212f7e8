"""One small MoD run, without a sweep: the shortest way to see a model train.

Command   modjax train --config=configs/single.py --workdir=work/single
Cost      about a minute on 2 cores
Expected  a validation loss well below 2.5 nats per byte
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {
        "vocab_size": 272,  # 256 bytes and 3 special ids, padded to a multiple of 16
        "d_model": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "d_ff": 256,
        "layers": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())",
    }
    config.train = {
        "batch_size": 16,
        "seq_len": 128,
        "steps": 500,
        "learning_rate": 0.01,
        "warmup_steps": 25,
    }
    config.data = {"name": "stdlib", "vocab": "bytes"}
    config.execution = {"log_every": 20}
    return config
