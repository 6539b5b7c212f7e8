"""Continuation of prompts by a finished run or a pretrained model.

Legend: B batch, L prompt positions, O new tokens.
"""

import codecs
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from modjax.data.codecs.codec import Codec
from modjax.data.codecs.tokenizer import Tokenizer
from modjax.decoding.generate import Generated, generate, resume
from modjax.decoding.sampling import PLAIN, Sampling
from modjax.errors import require
from modjax.finished.runs import Finished
from modjax.specs import ModelSpec

STREAM_EVERY = 32  # new tokens between two updates of the streamed text
MOST_PROMPT_TOKENS = 65_536  # the time of reading a prompt grows with the square of its length
EMPTY = "is empty: give at least one character"


@dataclass(frozen=True)
class SampleRequest:
    """Prompts to continue, and how to continue them.

    prompts: at least one text.
    max_new_tokens: upper bound for each continuation.
    stop: texts; a continuation ends before the first of them, or at the end of a document.
    sampling, routing, slack, seed: as `modjax.generate` takes them.
    """

    prompts: Sequence[str]
    max_new_tokens: int
    stop: Sequence[str] = ()
    sampling: Sampling = PLAIN
    routing: str = "causal"
    slack: float | None = None
    seed: int = 0


class Speaker(NamedTuple):
    """A model to sample from.

    spec: the model.
    graphdef, weights: `nnx.merge(graphdef, weights)` is its module.
    codec: its vocabulary.
    encode: function (text, field) -> tokens of a prompt. Its errors name the field.
    eos_ids: tokens that end a continuation.
    vocab_size: bound on the token ids, both in prompts and in draws.
    between: text to print between a prompt and its continuation.
    """

    spec: ModelSpec
    graphdef: Any
    weights: Any
    codec: Codec
    encode: Callable[[str, str], list[int]]
    eos_ids: Sequence[int]
    vocab_size: int
    between: str = ""


def of_run(run: Finished) -> Speaker:
    """Returns a finished run to sample from. Prompts are plain text, like its training data."""
    codec, about, model = run.cache.codec(), run.cache.manifest, run.spec.model
    return Speaker(
        model,
        run.model.graphdef,
        run.weights,
        codec,
        codec.encode,
        eos_ids=(about.eos_id,),
        vocab_size=min(about.vocab_size, model.vocab_size),
    )


def of_pretrained(
    spec: ModelSpec, graphdef: Any, weights: Any, tokenizer: Tokenizer | None, *, chat: bool
) -> Speaker:
    """Returns a pretrained model to sample from.

    chat: whether to render each prompt by the chat template, as a user's message.
    Raises InputError if the model has no tokenizer, or one with more tokens than the model.
    """
    accepted = "has no tokenizer: needs a tokenizer.json, or one inside its GGUF file"
    require(tokenizer is not None, "--pretrained", None, accepted)
    assert tokenizer is not None
    accepted = f"is too small for its tokenizer, which has {tokenizer.text_size} tokens"
    fits = tokenizer.text_size <= spec.vocab_size
    require(fits, "model.vocab_size", spec.vocab_size, accepted)

    def encode(text: str, field: str) -> list[int]:
        if not chat:
            return tokenizer.prompt(text, field)
        rendered = tokenizer.chat([{"role": "user", "content": text}])
        return tokenizer.prompt(rendered, field, rendered=True)

    return Speaker(
        spec,
        graphdef,
        weights,
        tokenizer,
        encode,
        eos_ids=[i for i in tokenizer.eos_ids if i < spec.vocab_size],
        vocab_size=min(tokenizer.vocab_size, spec.vocab_size),
        between="\n" if chat else "",
    )


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuation.

    text: the continuation.
    pieces: the bytes of each token of prompt and continuation.
    depths: the number of routed blocks that processed each of these tokens.
    routed_blocks: the number of routed blocks in the model.
    overflow: tokens dropped because a cache was full, summed over routed blocks.
    """

    prompt: str
    text: str
    pieces: list[bytes]
    depths: list[int]
    routed_blocks: int
    overflow: int


def check_routing(model: ModelSpec, routing: str) -> None:
    """Raises InputError unless the model can select by `routing` without future tokens."""
    accepted = "looks at tokens that are not drawn yet: must be causal, or the name of a rule"
    require(routing != "trained", "--routing", routing, accepted)
    model.check_routing(routing, "--routing")


def sample(speaker: Speaker, request: SampleRequest, write: Callable[[str], None]) -> list[Sample]:
    """Continues every prompt, and streams the first prompt and its continuation to `write`.

    Raises InputError for a prompt that is empty, too long or outside the vocabulary, for an empty
    stop and for an unusable routing, before anything compiles.
    """
    check_routing(speaker.spec, request.routing)
    codec = speaker.codec
    codec.pieces([0])  # raises InputError if the tokens have no exact bytes
    prompts = [_encode(prompt, speaker) for prompt in request.prompts]
    for text in request.stop:
        require(len(codec.encode(text, "--stop")) > 0, "--stop", text, EMPTY)
    stops = [text.encode() for text in request.stop]
    sampling = dataclasses.replace(request.sampling, vocab_size=speaker.vocab_size)

    write(request.prompts[0] + speaker.between)
    drawn = [_begin(speaker, request, prompts, sampling)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held_back = max(map(len, stops), default=1) - 1  # these bytes may be the beginning of a stop
    written, left = 0, request.max_new_tokens - STREAM_EVERY
    while True:
        state = drawn[-1].state
        rows = [_row(drawn, b, codec, stops) for b in range(len(prompts))]
        done_B = np.asarray(state.done_B) | [row.stopped for row in rows]
        over = left <= 0 or bool(done_B.all())
        data = b"".join(rows[0].pieces)
        ready = len(data) if over or done_B[0] else max(written, len(data) - held_back)
        write(decoder.decode(data[written:ready], final=over))
        written = ready
        if over:
            return _samples(speaker, request, prompts, drawn, rows)
        state = dataclasses.replace(state, done_B=jnp.asarray(done_B))
        now = min(STREAM_EVERY, left)
        graphdef, weights = speaker.graphdef, speaker.weights
        drawn.append(resume(graphdef, weights, state, max_new_tokens=now, sampling=sampling))
        left -= now


def _encode(prompt: str, speaker: Speaker) -> list[int]:
    ids = speaker.encode(prompt, "--prompt")
    length, fits = len(ids), f"must have at most {MOST_PROMPT_TOKENS}"
    require(length > 0, "--prompt", prompt, EMPTY)
    require(length <= MOST_PROMPT_TOKENS, "--prompt", prompt, f"has {length} tokens; {fits}")
    known = f"has tokens beyond the vocabulary's {speaker.vocab_size}"
    require(max(ids) < speaker.vocab_size, "--prompt", prompt, known)
    return ids


def _begin(
    speaker: Speaker, request: SampleRequest, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Generated:
    """Prefills the prompts and draws up to STREAM_EVERY tokens after each."""
    lengths_B = np.array([len(ids) for ids in prompts], np.int32)
    tokens_BL = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for b, ids in enumerate(prompts):
        tokens_BL[b, : len(ids)] = ids
    return generate(
        speaker.graphdef,
        speaker.weights,
        tokens_BL,
        lengths_B=lengths_B,
        routing=request.routing,
        slack=request.slack,
        sampling=sampling,
        stop=tuple((i,) for i in speaker.eos_ids),
        seed=request.seed,
        max_new_tokens=min(STREAM_EVERY, request.max_new_tokens),
        max_length=int(lengths_B.max()) + request.max_new_tokens,
    )


class _Row(NamedTuple):
    """The tokens drawn for one prompt. stopped: whether a stop ended them."""

    pieces: list[bytes]
    depths: list[int]
    stopped: bool


def _row(drawn: Sequence[Generated], b: int, codec: Codec, stops: Sequence[bytes]) -> _Row:
    """Returns the tokens drawn so far for prompt b, up to the first of `stops`.

    Searches the text and not the tokens: several sequences of tokens may spell the same stop.
    """
    tokens_O = np.concatenate([part.tokens_BO[b] for part in drawn])
    depths_O = np.concatenate([part.depths_BO[b] for part in drawn])
    pieces = codec.pieces(tokens_O[depths_O >= 0].tolist())
    starts = [at for at in (b"".join(pieces).find(text) for text in stops) if at >= 0]
    kept: list[bytes] = []
    left = min(starts, default=sum(map(len, pieces)))
    for piece in pieces:
        if left == 0:
            break
        kept.append(piece[:left])
        left -= len(kept[-1])
    return _Row(kept, depths_O[: len(kept)].tolist(), len(starts) > 0)


def _samples(
    speaker: Speaker,
    request: SampleRequest,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Generated],
    rows: Sequence[_Row],
) -> list[Sample]:
    overflow_BO = np.concatenate([part.overflow_BO for part in drawn], axis=1)
    of_prompts_B = np.asarray(drawn[-1].state.cache.overflow_B) - overflow_BO.sum(axis=1)
    depths_BL = np.asarray(drawn[0].prompt_depths_BL)
    return [
        Sample(
            prompt=prompt,
            text=b"".join(row.pieces).decode(errors="replace"),
            pieces=speaker.codec.pieces(prompts[b], begins=True) + row.pieces,
            depths=depths_BL[b, : len(prompts[b])].tolist() + row.depths,
            routed_blocks=speaker.spec.routed(),
            overflow=int(of_prompts_B[b] + overflow_BO[b, : len(row.depths)].sum()),
        )
        for b, (prompt, row) in enumerate(zip(request.prompts, rows, strict=True))
    ]
