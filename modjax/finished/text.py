"""Text from a finished run: prompts in, text out while it is drawn, and how deep each token went.

Legend: B batch, L prompt positions, N new tokens.
"""

import codecs
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from modjax.data.cache import shown
from modjax.data.vocabulary import Codec
from modjax.decoding.generate import Generated, Sampling, generate, resume
from modjax.errors import require
from modjax.finished.runs import Finished

# Tokens between two looks at what was drawn.
STREAM_EVERY = 32
# The time of reading a prompt grows with the square of it.
MOST_PROMPT_TOKENS = 65_536
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
    require(
        importlib.util.find_spec("sentencepiece") is not None,
        "modjax sample",
        "sentencepiece",
        "missing package; pip install -e '.[data]'",
    )
    return Codec(run.cache.vocabulary_model(), shown(run.cache.path))


def choose_routing(run: Finished, routing: str | None) -> str:
    """Returns `routing`, or "causal". Raises InputError for one that the model does not have."""
    routing = routing or "causal"
    accepted = "looks at tokens that are not drawn yet: must be causal, or the name of a rule"
    require(routing != "trained", "--routing", routing, accepted)
    run.spec.model.check_routing(routing, "--routing")
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
    """Continues every prompt; `write` gets the first one and its continuation, while it is drawn.

    A row ends at the end of a document, or before one of `stop`.
    Raises InputError for an empty prompt or one outside the vocabulary, before anything compiles.
    """
    routing = choose_routing(run, routing)
    codec = open_codec(run)
    vocab_size = min(run.cache.manifest.vocab_size, run.spec.model.vocab_size)
    encoded = [codec.encode(prompt, "--prompt") for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        require(len(ids) > 0, "--prompt", prompt, "is empty: give at least one character")
        require(
            len(ids) <= MOST_PROMPT_TOKENS,
            "--prompt",
            prompt,
            f"has {len(ids)} tokens; must have at most {MOST_PROMPT_TOKENS}",
        )
        require(
            max(ids) < vocab_size,
            "--prompt",
            prompt,
            f"has tokens beyond the vocabulary's {vocab_size}",
        )
    for text in stop:
        require(
            len(codec.encode(text, "--stop")) > 0,
            "--stop",
            text,
            "is empty: give at least one character",
        )
    tokens_BL = np.zeros((len(encoded), max(map(len, encoded))), np.int32)
    for b, ids in enumerate(encoded):
        tokens_BL[b, : len(ids)] = ids
    lengths_B = np.array([len(ids) for ids in encoded], np.int32)
    stops = [text.encode() for text in stop]
    sampling = dataclasses.replace(sampling, vocab_size=vocab_size)

    write(prompts[0])
    first = min(STREAM_EVERY, max_new_tokens)
    drawn: list[Generated] = [
        generate(
            run.model.graphdef,
            run.weights,
            tokens_BL,
            lengths_B=lengths_B,
            routing=routing,
            slack=slack,
            sampling=sampling,
            stop=((run.cache.manifest.eos_id,),),
            seed=seed,
            max_new_tokens=first,
            max_length=int(lengths_B.max()) + max_new_tokens,
        )
    ]
    stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held_back = max(map(len, stops), default=1) - 1  # may be the beginning of a stop
    shown, left = 0, max_new_tokens - first
    while True:
        state = drawn[-1].state
        rows = [_row(drawn, b, codec, stops) for b in range(len(prompts))]
        done_B = np.asarray(state.done_B) | [row.stopped for row in rows]
        over = left == 0 or bool(done_B.all())
        data = b"".join(rows[0].pieces)
        ready = len(data) if over or done_B[0] else max(shown, len(data) - held_back)
        write(stream.decode(data[shown:ready], final=over))
        shown = ready
        if over:
            break
        now = min(STREAM_EVERY, left)
        state = dataclasses.replace(state, done_B=jnp.asarray(done_B))
        drawn.append(
            resume(run.model.graphdef, run.weights, state, max_new_tokens=now, sampling=sampling)
        )
        left -= now
    overflow_BO = np.concatenate([part.overflow_BO for part in drawn], axis=1)
    prompts_B = np.asarray(drawn[-1].state.cache.overflow_B) - overflow_BO.sum(axis=1)
    routed = run.spec.model.routed()
    return [
        Sample(
            prompt=prompt,
            text=b"".join(rows[b].pieces).decode(errors="replace"),
            pieces=codec.pieces(encoded[b]) + rows[b].pieces,
            depths=np.asarray(drawn[0].prompt_depths_BL)[b, : lengths_B[b]].tolist()
            + rows[b].depths,
            routed_blocks=routed,
            overflow=int(prompts_B[b] + overflow_BO[b, : len(rows[b].depths)].sum()),
        )
        for b, prompt in enumerate(prompts)
    ]


class _Row(NamedTuple):
    pieces: list[bytes]
    depths: list[int]
    stopped: bool


def _row(drawn: Sequence[Generated], b: int, codec: Codec, stops: Sequence[bytes]) -> _Row:
    """What was drawn in a row until now, up to the first of `stops`.

    These are looked for in the text: the tokens that spell one may be others than its own.
    """
    tokens_O = np.concatenate([part.tokens_BO[b] for part in drawn])
    depths_O = np.concatenate([part.depths_BO[b] for part in drawn])
    pieces = codec.pieces(tokens_O[depths_O >= 0].tolist())
    starts = [at for at in (b"".join(pieces).find(text) for text in stops) if at >= 0]
    kept: list[bytes] = []
    room = min(starts, default=sum(map(len, pieces)))
    for piece in pieces:
        if room == 0:
            break
        kept.append(piece[:room])
        room -= len(kept[-1])
    return _Row(kept, depths_O[: len(kept)].tolist(), len(starts) > 0)


def coloured(sample: Sample) -> str:
    """Returns prompt and continuation for a terminal: the darker a token, the deeper it went."""
    out, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece, depth in zip(sample.pieces, sample.depths, strict=True):
        shade = round(depth / max(sample.routed_blocks, 1) * (len(DEPTH_COLOURS) - 1))
        text = decoder.decode(piece).replace("\n", "\x1b[0m\n")
        out.append(f"\x1b[48;5;{DEPTH_COLOURS[shade]}m\x1b[38;5;16m{text}")
    legend = "".join(f"\x1b[48;5;{colour}m\x1b[38;5;16m  " for colour in DEPTH_COLOURS)
    return (
        "".join(out)
        + decoder.decode(b"", final=True)
        + f"\x1b[0m\n\n0 {legend}\x1b[0m {sample.routed_blocks} routed blocks used; "
        f"{_mean(sample)} on average"
    )


def numbered(sample: Sample) -> str:
    """Returns each token of prompt and continuation on a line of its own, after its depth."""
    lines = [
        f"{depth}\t{_quoted(piece)}"
        for piece, depth in zip(sample.pieces, sample.depths, strict=True)
    ]
    mean = f"{_mean(sample)} of {sample.routed_blocks} routed blocks used on average"
    return "\n".join([*lines, "", mean])


def _quoted(piece: bytes) -> str:
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:  # a token may be a part of a character
        return repr(piece)


def _mean(sample: Sample) -> str:
    return f"{sum(sample.depths) / len(sample.depths):.2f}"
