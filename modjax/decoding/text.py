"""Text from a finished run: prompts in, text out while it is drawn, and how deep each token went.

Legend: B batch, L prompt positions, N new tokens.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modjax.config import InputError, require
from modjax.data.cache import open_store
from modjax.data.vocabulary import Codec
from modjax.decoding.generate import Generated, Sampling, generate, resume
from modjax.training.finished import Finished

# Tokens between two looks at what was drawn.
STREAM_EVERY = 32
# From "no routed block" to "every one": colours of a 256-colour terminal, light to dark.
DEPTH_COLOURS = (255, 230, 229, 222, 215, 209, 203, 197, 161, 125)


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuation. depths: routed blocks used, per token of both.

    overflow: tokens that found no slot in the cache of a routed block, summed over blocks.
    """

    prompt: str
    text: str
    pieces: list[bytes]
    depths: list[int]
    routed_blocks: int
    overflow: int


def open_codec(run: Finished) -> Codec:
    """The vocabulary of the data that the run was trained on."""
    if run.cache.manifest.vocab == "bytes":
        return Codec(None)
    model = open_store(run.cache.path).read("vocabulary.model").result()
    return Codec(bytes(model.value))


def choose_routing(run: Finished, routing: str | None) -> str:
    """`routing`, or the best causal one that the model has learned.

    Raises InputError for one that it has not learned, or that looks ahead.
    """
    config = run.spec.model
    if routing is None:
        dense = not any(slot.routed for slot in config.slots)
        routing = "router" if dense else config.causal_routing()
        require(
            routing is not None, "--routing", None,
            "this model has not learned to select without the future: train it with "
            "model.mod.predictor_weight > 0",
        )  # fmt: skip
    require(routing != "top_k", "--routing", routing,
            "looks at tokens that are not drawn yet: router, predictor or threshold")  # fmt: skip
    config.check_routing(routing, "--routing")
    return routing


def sample(
    run: Finished,
    prompts: Sequence[str],
    *,
    routing: str | None,
    slack: float | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int,
    write: Callable[[str], None],
) -> list[Sample]:
    """Continues every prompt; `write` is called with the first one's text as it is drawn.

    A row ends at the end of a document or after one of `stop`, which is left out of its text.
    Raises InputError for an empty prompt or one outside the vocabulary, before anything compiles.
    """
    routing = choose_routing(run, routing)
    codec = open_codec(run)
    eos = run.cache.manifest.eos_id
    encoded = [codec.encode(prompt, "--prompt") for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        require(len(ids) > 0, "--prompt", prompt, "is empty: give at least one character")
        require(max(ids) < run.spec.model.vocab_size, "--prompt", prompt,
                f"has tokens beyond model.vocab_size = {run.spec.model.vocab_size}")  # fmt: skip
    stops = ((eos,), *(tuple(codec.encode(text, "--stop")) for text in stop))
    if () in stops:
        raise InputError("--stop", "", "is empty: give at least one character")
    tokens_BL = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for b, ids in enumerate(encoded):
        tokens_BL[b, : len(ids)] = ids
    lengths_B = np.array([len(ids) for ids in encoded], np.int32)
    vocab_size = min(run.cache.manifest.vocab_size, run.spec.model.vocab_size)
    sampling = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, vocab_size)

    first = min(STREAM_EVERY, max_new_tokens)
    drawn: list[Generated] = [
        generate(
            run.model.graphdef, run.params, tokens_BL, lengths_B=lengths_B, routing=routing,
            slack=slack, sampling=sampling, stop=stops, seed=seed, max_new_tokens=first,
            max_length=int(lengths_B.max()) + max_new_tokens,
        )
    ]  # fmt: skip
    stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
    left = max_new_tokens - first
    while True:
        write(stream.decode(b"".join(codec.pieces(_kept(drawn[-1].tokens_BN[0], eos)))))
        if left == 0 or bool(np.all(drawn[-1].state.done_B)):
            break
        now = min(STREAM_EVERY, left)
        drawn.append(
            resume(run.model.graphdef, run.params, drawn[-1].state, max_new_tokens=now,
                   sampling=sampling)
        )  # fmt: skip
        left -= now
    new_BN = np.concatenate([np.asarray(part.tokens_BN) for part in drawn], axis=1)
    depths_BN = np.concatenate([np.asarray(part.depths_BN) for part in drawn], axis=1)
    prompt_depths_BL = np.asarray(drawn[0].prompt_depths_BL)
    overflow_B = sum(np.asarray(c.overflow_B) for c in drawn[-1].state.cache.layers)
    model = run.spec.model
    routed = model.num_groups * sum(slot.routed for slot in model.slots)
    samples = []
    for b, prompt in enumerate(prompts):
        count = int(np.sum(depths_BN[b] >= 0))
        pieces = codec.pieces([*encoded[b], *new_BN[b, :count]])
        text = b"".join(pieces[len(encoded[b]) :]).decode(errors="replace")
        for end in stop:
            text = text.removesuffix(end)
        depths = [*prompt_depths_BL[b, : lengths_B[b]], *depths_BN[b, :count]]
        samples.append(
            Sample(prompt, text, pieces, [int(d) for d in depths], routed, int(overflow_B[b]))
        )
    return samples


def _kept(tokens_N: np.ndarray, eos: int) -> list[int]:
    return [int(token) for token in tokens_N if token not in (0, eos)]


def coloured(sample: Sample) -> str:
    """Prompt and continuation for a terminal: the darker, the more routed blocks a token used."""
    out, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece, depth in zip(sample.pieces, sample.depths, strict=True):
        shade = round(depth / max(sample.routed_blocks, 1) * (len(DEPTH_COLOURS) - 1))
        text = decoder.decode(piece).replace("\n", "\x1b[0m\n")
        out.append(f"\x1b[48;5;{DEPTH_COLOURS[shade]}m\x1b[38;5;16m{text}")
    legend = "".join(
        f"\x1b[48;5;{colour}m\x1b[38;5;16m  " for colour in DEPTH_COLOURS
    )  # fmt: skip
    mean = sum(sample.depths) / len(sample.depths)
    return (
        "".join(out) + f"\x1b[0m\n\n0 {legend}\x1b[0m {sample.routed_blocks} routed blocks used; "
        f"{mean:.2f} on average"
    )
