"""Continuing prompts with a finished run.

Legend: B batch, L prompt positions, O new tokens.
"""

import codecs
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from modjax.data.token_cache import shown
from modjax.data.vocabulary import Codec
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
    stop: texts before which a continuation ends. It also ends at the end of a document.
    sampling, routing, slack, seed: as `modjax.generate` takes them.
    """

    prompts: Sequence[str]
    max_new_tokens: int
    stop: Sequence[str] = ()
    sampling: Sampling = PLAIN
    routing: str = "causal"
    slack: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuation.

    text: the continuation.
    pieces: the bytes of each token of prompt and continuation.
    depths: the number of routed blocks that processed each of these tokens.
    routed_blocks: the number of routed blocks in the model.
    overflow: tokens dropped for want of a cache slot, summed over routed blocks.
    """

    prompt: str
    text: str
    pieces: list[bytes]
    depths: list[int]
    routed_blocks: int
    overflow: int


def open_codec(run: Finished) -> Codec:
    """Returns the vocabulary of the data that the run was trained on."""
    if run.cache.manifest.vocab == "bytes":
        return Codec(None)
    installed = importlib.util.find_spec("sentencepiece") is not None
    require(installed, "sentencepiece", None, "missing package; pip install -e '.[data]'")
    return Codec(run.cache.vocabulary_model(), shown(run.cache.path))


def check_routing(model: ModelSpec, routing: str) -> None:
    """Raises InputError unless the model can select by `routing` without future tokens."""
    accepted = "looks at tokens that are not drawn yet: must be causal, or the name of a rule"
    require(routing != "trained", "--routing", routing, accepted)
    model.check_routing(routing, "--routing")


def sample(run: Finished, request: SampleRequest, write: Callable[[str], None]) -> list[Sample]:
    """Continues every prompt, and streams the first prompt and its continuation to `write`.

    Raises InputError for a prompt that is empty, too long or outside the vocabulary, for an empty
    stop and for an unusable routing, before anything compiles.
    """
    check_routing(run.spec.model, request.routing)
    codec = open_codec(run)
    vocab_size = min(run.cache.manifest.vocab_size, run.spec.model.vocab_size)
    prompts = [_encode(prompt, codec, vocab_size) for prompt in request.prompts]
    for text in request.stop:
        require(len(codec.encode(text, "--stop")) > 0, "--stop", text, EMPTY)
    stops = [text.encode() for text in request.stop]
    sampling = dataclasses.replace(request.sampling, vocab_size=vocab_size)

    write(request.prompts[0])
    drawn = [_begin(run, request, prompts, sampling)]
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
            return _samples(run, request, prompts, drawn, rows, codec)
        state = dataclasses.replace(state, done_B=jnp.asarray(done_B))
        now = min(STREAM_EVERY, left)
        drawn.append(
            resume(run.model.graphdef, run.weights, state, max_new_tokens=now, sampling=sampling)
        )
        left -= now


def _encode(prompt: str, codec: Codec, vocab_size: int) -> list[int]:
    ids = codec.encode(prompt, "--prompt")
    length, fits = len(ids), f"must have at most {MOST_PROMPT_TOKENS}"
    require(length > 0, "--prompt", prompt, EMPTY)
    require(length <= MOST_PROMPT_TOKENS, "--prompt", prompt, f"has {length} tokens; {fits}")
    known = f"has tokens beyond the vocabulary's {vocab_size}"
    require(max(ids) < vocab_size, "--prompt", prompt, known)
    return ids


def _begin(
    run: Finished, request: SampleRequest, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Generated:
    """Prefills the prompts and draws up to STREAM_EVERY tokens after each."""
    lengths_B = np.array([len(ids) for ids in prompts], np.int32)
    tokens_BL = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for b, ids in enumerate(prompts):
        tokens_BL[b, : len(ids)] = ids
    return generate(
        run.model.graphdef,
        run.weights,
        tokens_BL,
        lengths_B=lengths_B,
        routing=request.routing,
        slack=request.slack,
        sampling=sampling,
        stop=((run.cache.manifest.eos_id,),),
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
    run: Finished,
    request: SampleRequest,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Generated],
    rows: Sequence[_Row],
    codec: Codec,
) -> list[Sample]:
    overflow_BO = np.concatenate([part.overflow_BO for part in drawn], axis=1)
    of_prompts_B = np.asarray(drawn[-1].state.cache.overflow_B) - overflow_BO.sum(axis=1)
    depths_BL = np.asarray(drawn[0].prompt_depths_BL)
    return [
        Sample(
            prompt=prompt,
            text=b"".join(row.pieces).decode(errors="replace"),
            pieces=codec.pieces(prompts[b]) + row.pieces,
            depths=depths_BL[b, : len(prompts[b])].tolist() + row.depths,
            routed_blocks=run.spec.model.routed(),
            overflow=int(of_prompts_B[b] + overflow_BO[b, : len(row.depths)].sum()),
        )
        for b, (prompt, row) in enumerate(zip(request.prompts, rows, strict=True))
    ]
