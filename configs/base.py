"""Defaults that the other configs share. Each of them states its arms, budgets, and what differs.

A config imports this file by `from base import sweep`. modjax looks for base.py beside the config,
then in this folder. The plan.json of a sweep stores all values, the defaults included.
"""

import ml_collections


def sweep(arms, budgets, **changes):
    """Returns the config of a sweep at the scale of two CPU cores.

    arms: name -> the model fields in which the arm differs.
    budgets: training FLOPs.
    changes: fields of the group `sweep` that replace those below. A group keeps the fields that its
      change leaves out.
    """
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}  # 256 bytes and 3 special ids, padded to a multiple of 16
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": arms,
        "baseline": next(iter(arms)),
        "budgets": budgets,
        "sizes": 5,
        "spread": 0.5,
        "seeds": (0, 1),
        "optimum": {"budget": 3e11, "params": 3.5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {
            "batch_size": 4,
            "batch_exponent": 0.0,
            "learning_rate": 0.2,
            "warmup_fraction": 0.05,
        },
        "flops_per_second": 2.5e10,
    }
    config.sweep.update(changes)
    return config


def at_rates(arms, rates):
    """Returns every arm at every peak learning rate, as in "dense-lr0_2"."""
    return {
        f"{arm}-lr{rate}".replace(".", "_"): fields | {"recipe": {"learning_rate": rate}}
        for arm, fields in arms.items()
        for rate in rates
    }


def eight_layers(layers):
    """Returns the config of one run of eight layers, to analyse after training."""
    config = ml_collections.ConfigDict()
    config.model = {
        "vocab_size": 272,
        "d_model": 96,
        "num_layers": 8,
        "num_heads": 6,
        "num_kv_heads": 6,
        "d_ff": 384,
        "layers": layers,
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
