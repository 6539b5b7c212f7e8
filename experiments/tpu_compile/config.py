"""The shapes whose train steps are compiled: --config=experiments/tpu_compile/config.py:ARM-SIZE.

The heads are 128 wide, and a batch has 128 sequences of 2048 tokens, as in configs/paper.py.
"""

import ml_collections

SIZES = {"220M": (1024, 16), "1B": (1792, 28), "3B": (2560, 40)}  # width, layers
MOE = "Seq(Attention(), MoE(4))"
ARMS = {
    "dense": "Dense()",
    "mod12": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())",
    "moe": MOE,
    "moe8": "Seq(Attention(), MoE(8))",
    "integrated": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4)))",
    "staged": f"{MOE}, MoD({MOE}, capacity=0.125, causal=Predictor())",
}


def get_config(cell: str) -> ml_collections.ConfigDict:
    arm, _, size = cell.partition("-")
    width, layers = SIZES[size]
    config = ml_collections.ConfigDict()
    config.model = {
        "vocab_size": 32_128,
        "d_model": width,
        "num_layers": layers,
        "num_heads": width // 128,
        "num_kv_heads": width // 128,
        "d_ff": 4 * width,
        "layers": ARMS[arm],
        "dtype": "bfloat16",
    }
    config.train = {
        "seq_len": 2048,
        "batch_size": 128,
        "steps": 1000,
        "warmup_steps": 20,
        "learning_rate": 1e-3,
    }
    config.data = {"name": "c4", "vocab": "sentencepiece:32000"}
    config.execution = {}
    return config
