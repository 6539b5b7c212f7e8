"""Small models that specs are tested with."""

from modjax.specs import MLP, Attention, MoD, Received, Seq, TopK

MODEL = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 2,
    "d_ff": 32,
}

RECEIVED = Seq(Attention(received=True), MLP())
BY_RECEIVED = MoD(router=Received(), rule=TopK("one"))
TRAIN = {"batch_size": 8, "seq_len": 16, "steps": 10, "learning_rate": 1e-3, "warmup_steps": 1}
