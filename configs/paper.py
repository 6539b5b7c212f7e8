"""The budgets of Mixture-of-Depths (arXiv 2404.02258, figures 3, 4, 7): 6e18, 2e19, 1e20 FLOPs.

Dense models have 90M to 3.3B total parameters. Models of the other arms have the same forward
FLOPs, and therefore more parameters: 134M to 5.6B for MoD of 12.5%, up to 4.4B for MoD of 50%, 189M
to 8.2B for experts, up to 12.7B for integrated MoDE and up to 14.6B for staged MoDE. Batches have
128 sequences of 2048 tokens of C4. The sizes lie around the expected optimum of the baseline. At
6e18 FLOPs this is the paper's, 220M parameters (taken as non-embedding ones). It grows as the
square root of the budget.

Command   modjax data prepare --tfds c4 --vocab sentencepiece:32000
          modjax sweep --config=configs/paper.py:6e18 --workdir=DIR        (or 2e19, or 1e20;
          without an argument all three; see launch/README.md)
Cost      2.9e20 FLOPs for 6e18 (49 runs), 9.8e20 for 2e19, 4.9e21 for 1e20. The time that
          `modjax plan` prints assumes 5e15 FLOP/s, such as 64 TPU v5e chips at 40%: set
          --config.sweep.flops_per_second to yours. Each run shards its parameters over as few
          chips, and recomputes as little, as memory allows (execution.fsdp, execution.remat).
Expected  the paper's: optimal MoD models of 12.5% are larger than the optimal baseline and better
          by up to 1.5%, and random routing is much worse. Not run by us.

The paper leaves open the learning rate, optimizer, feed-forward width, tokenizer and data.
"""

import ml_collections

# Figure 7 gives neither the number of experts nor how they are balanced; it draws four.
MOE = "Seq(Attention(), MoE(experts=4))"
BUDGETS = {"6e18": 6e18, "2e19": 2e19, "1e20": 1e20}


def get_config(budget: str = "all") -> ml_collections.ConfigDict:
    if budget not in (*BUDGETS, "all"):
        raise ValueError(f"the budget must be one of {', '.join(BUDGETS)}, not {budget!r}")
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 32_128, "dtype": "bfloat16"}
    config.train = {"seq_len": 2048, "b2": 0.98, "eval_sequences": 4096, "eval_every": 0}
    config.data = {"name": "c4", "vocab": "sentencepiece:32000", "seed": 0, "max_epochs": 1.0}
    config.execution = {"checkpoint_seconds": 600.0}
    config.sweep = {
        "arms": {
            "dense": {"layers": "Dense()"},
            "mod12": {"layers": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())"},
            "mod50": {"layers": "Dense(), MoD(Dense(), capacity=0.5, causal=Predictor())"},
            "random50": {"layers": "Dense(), MoD(Dense(), capacity=0.5, rule=Random())"},
            "moe": {"layers": MOE},
            "staged": {"layers": f"{MOE}, MoD({MOE}, capacity=0.125, causal=Predictor())"},
            "integrated": {"layers": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4)))"},
        },
        "baseline": "dense",
        "budgets": tuple(BUDGETS.values()) if budget == "all" else (BUDGETS[budget],),
        "sizes": 7,
        "spread": 0.55,
        "seeds": (0,),
        "optimum": {"budget": 6e18, "params": 2.2e8, "exponent": 0.5},
        "shape": {"width_multiple": 128, "head_dim": 128, "aspect": 64.0, "layer_multiple": 2},
        "recipe": {"batch_size": 128, "learning_rate": 0.1, "warmup_fraction": 0.02},
        "flops_per_second": 5e15,
    }
    return config
