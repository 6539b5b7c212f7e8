"""Export of finished runs to Hugging Face's format, each with a model card."""

from pathlib import Path

from modjax import __version__
from modjax.data.codecs.codec import Bytes, Codec
from modjax.data.codecs.tokenizer import Tokenizer
from modjax.finished.runs import Loaded
from modjax.pretrained import save_pretrained
from modjax.records import RunRecord, causal_loss
from modjax.specs import ModelSpec


def export(run: Loaded, record: RunRecord, out: Path, *, dtype: str | None, command: str) -> None:
    """Writes a run as config.json, safetensors, its vocabulary, and a model card in README.md.

    out, dtype, errors: see `save_pretrained`.
    command: the command line that trained the run.
    """
    eos_id = None if run.tokenizer is None else run.tokenizer.eos_ids[0]
    about = {"max_position_embeddings": run.spec.train.seq_len, "eos_token_id": eos_id}
    tokenizer = run.tokenizer
    save_pretrained(
        out, run.spec.model, run.weights, config=about, tokenizer=tokenizer, dtype=dtype
    )
    card = _card(run.spec.model, run.spec.base, record, tokenizer, command)
    (out / "README.md").write_text(card, encoding="utf-8")


def _card(
    model: ModelSpec, base: str | None, record: RunRecord, codec: Codec | None, command: str
) -> str:
    """Returns the model card: what the model is, its cost, its loss, its data and its command."""
    layers, causal = ", ".join(map(str, model.layers)), causal_loss(record)
    loss = f"{record.eval_loss:.4f} +- {record.eval_loss_sem:.4f} nats per token as trained"
    if causal is not None and causal != record.eval_loss:
        loss += f"; {causal:.4f} under routing that never looks ahead"
    rows = {
        "Layers": f"`{layers}`, {model.num_layers} in all, d_model {model.d_model}",
        "Parameters": f"{record.params_total:,}; {record.params_non_embedding:,} are no embedding",
        "Training FLOPs": f"{record.train_flops:.4g} of a budget of {record.budget_flops:.4g}",
        "Training": f"{record.tokens:,} tokens in {record.steps:,} steps of {record.batch_size} "
        f"sequences of {record.seq_len}; peak learning rate {record.learning_rate:g}",
        "Loss on held-out text": f"{loss}, over {record.eval_tokens:,} tokens; "
        f"{record.eval_bits_per_byte:.4f} bits per byte",
        "Starts from": base or "random weights",
        "Data fingerprint": f"`{record.data_fingerprint}`",
        "Tokens": _tokens(codec),
        "Code": f"modjax {__version__}, {record.code_version}",
        "Command": f"`{command}`",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    head = f"---\nlibrary_name: transformers\n---\n# {record.run_id}\n\n"
    return f"{head}A decoder that modjax trained and exported.\n\n| | |\n|---|---|\n{table}\n"


def _tokens(codec: Codec | None) -> str:
    if codec is None:
        return "not exported: the data was not at hand"
    if isinstance(codec, Bytes):
        return f"UTF-8 bytes: id = byte + {codec.FIRST}; {codec.eos_ids[0]} ends a document"
    file = "tokenizer.json" if isinstance(codec, Tokenizer) else "tokenizer.model"
    return f"{file}; {codec.eos_ids[0]} ends a document"
