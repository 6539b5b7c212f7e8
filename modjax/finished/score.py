"""Scores of a model: nats per token of held-out text, and likelihood tasks.

Legend: B sequences, L positions, D model width, V vocabulary, J units.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from modjax.data.progress import say
from modjax.errors import require
from modjax.finished.paired import compare
from modjax.finished.tasks import Request
from modjax.finished.text import MOST_PROMPT_TOKENS, Speaker, check_routing
from modjax.nn import in_chunks
from modjax.nn.records import counts, outcomes

BASE = "all"  # the routing that processes every position
POSITIONS = 4096  # of a forward pass
SHORTEST = 32  # positions of a task's sequence, with padding
Row = tuple[list[int], int]  # tokens of a sequence, and the index of the first that is scored


class Unit(NamedTuple):
    """A unit of the bootstrap: a block of windows of text, or a document of a task.

    weight: number of scored tokens of text; 1 for a document.
    right: index of the right continuation; None unless a document has choices.
    sizes: bytes of each continuation.
    """

    rows: list[Row]
    weight: int = 1
    right: int | None = None
    sizes: tuple[int, ...] = ()


class Score(NamedTuple):
    """Scores of a file, or of all files pooled.

    count: number of scored tokens of text, or of documents of a task.
    measures: "nats" per token of text, or of the right continuation. Tasks with choices have
      "accuracy", and "per byte", which divides log likelihoods by bytes. Other tasks have "greedy",
      the share of continuations that greedy decoding reproduces. Each as `compare` returns it.
    layers: layer -> name -> value, see `Record.outcome`; "all" is all layers together.
    units: each measure of the model in each unit of the bootstrap, and the units' weights, so that
      two models can be compared.
    routers: the routers file of the model, if it has one.
    """

    name: str
    count: int
    measures: dict[str, dict[str, Any]]
    layers: dict[str, dict[str, float]]
    units: dict[str, list[float]]
    routers: str | None = None


def text_units(speaker: Speaker, path: Path, texts: Sequence[str], seq_len: int) -> list[Unit]:
    """Returns windows of `seq_len` inputs, in blocks of n^(1/3) consecutive ones of all n.

    Raises InputError for texts without two tokens, and for a bad `seq_len`.
    """
    begin = speaker.encode("", "--text")[:1]
    room, accepted = seq_len - len(begin), f"must be {len(begin) + 1} to {MOST_PROMPT_TOKENS}"
    require(0 < room and seq_len <= MOST_PROMPT_TOKENS, "--seq-len", seq_len, accepted)
    rows = [
        (begin + ids[start : start + room + 1], len(begin) + 1)
        for ids in (speaker.codec.encode(text, "--text") for text in texts)
        for start in range(0, len(ids) - 1, room)
    ]
    require(len(rows) > 0, "--text", str(path), "holds no text of two tokens or more")
    size = round(len(rows) ** (1 / 3))
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [Unit(block, sum(len(ids) - first for ids, first in block)) for block in blocks]


def task_unit(speaker: Speaker, document: Sequence[Request]) -> Unit:
    """Returns a document of a task. White space between context and continuation is scored.

    Raises InputError for a request that is too long.
    """
    rows, right = [], document[0].label
    for request in document:
        whole = speaker.codec.encode(request.context + request.continuation, "--tasks")
        context = speaker.codec.encode(request.context.rstrip(), "--tasks")
        # A token may span the end of the context: it is scored, and so is the last one.
        alike = (i for i, pair in enumerate(zip(context, whole, strict=False)) if len({*pair}) > 1)
        shared = min(next(alike, len(context)), len(whole) - 1)
        begin = speaker.encode("", "--tasks")[:1] or list(speaker.eos_ids[: shared == 0])
        accepted = f"has {len(whole)} tokens; must have at most {MOST_PROMPT_TOKENS}"
        require(len(whole) <= MOST_PROMPT_TOKENS, "--tasks", request.where, accepted)
        rows.append((begin + whole, len(begin) + shared))
    sizes = tuple(len(request.continuation.encode()) for request in document)
    return Unit(rows, 1, right if isinstance(right, int) else None, sizes)


def score(
    speaker: Speaker,
    files: Mapping[str, Sequence[Unit]],
    routing: str,
    width: int | None,
    bases: dict[tuple[str, str], Any] | None = None,
) -> list[Score]:
    """Returns the scores of each file and, if all have the same measures, of all pooled.

    A model that has the routing BASE is its own base under that routing.

    width: inputs of each window of text; None for tasks.
    bases: results of the base, by file and dtype, from earlier calls for models of the same base.
      New ones are added.
    """
    check_routing(speaker.spec, routing)
    has_base = BASE in speaker.spec.routings and routing != BASE
    bases, found = {} if bases is None else bases, {}
    for name, units in files.items():
        rows = [row for unit in units for row in unit.rows]
        scored = [_scored(speaker, name, rows, routing, width)]
        if has_base:
            of = name, speaker.spec.dtype
            if of not in bases:
                bases[of] = _scored(speaker, name, rows, BASE, width)
            scored.append(bases[of])
        measured = [_measures(units, *one[:2], width is None) for one in scored]
        found[name] = measured, np.array([unit.weight for unit in units]), scored[0][2]
    if len({tuple(measured[0]) for measured, *_ in found.values()}) == 1 < len(found):
        found["pooled"] = jax.tree.map(lambda *parts: np.concatenate(parts), *found.values())
    scores = []
    for name, (measured, weights_J, counted) in found.items():
        each = {key: compare([one[key] for one in measured], weights_J) for key in measured[0]}
        whole, layers = outcomes(counted)
        layers = {"all": whole, **layers} if layers else {}
        units = {**measured[0], "weight": weights_J}
        units = {key: values_J.tolist() for key, values_J in units.items()}
        scores.append(Score(name, int(weights_J.sum()), each, layers, units))
    return scores


def _measures(units: Sequence[Unit], nats_B: Any, greedy_B: Any, tasks: bool) -> dict[str, Any]:
    """Returns the measures of each unit, (J,)."""
    ends = np.cumsum([len(unit.rows) for unit in units])[:-1]
    each = list(zip(units, np.split(nats_B, ends), strict=True))
    if units[0].right is None:
        nats_J = {"nats": np.array([nats.sum() for _, nats in each])}
        return {**nats_J, "greedy": greedy_B} if tasks else nats_J
    return {
        "accuracy": np.array([np.argmin(nats) == unit.right for unit, nats in each]),
        "per byte": np.array([np.argmin(nats / unit.sizes) == unit.right for unit, nats in each]),
        "nats": np.array([nats[unit.right] for unit, nats in each]),
    }


def _scored(
    speaker: Speaker, name: str, rows: Sequence[Row], routing: str, width: int | None
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Returns each row's nats, whether its scored tokens are all the likeliest, and its counts."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found, done, reported = [], 0, time.monotonic()
    while done < len(rows):
        longest = len(rows[order[done]][0]) - 1
        length = width or max(SHORTEST, 1 << (longest - 1).bit_length())
        size = max(1, POSITIONS // length)
        chunk = [rows[i] for i in order[done : done + size]]
        tokens_BL, ends_B2 = np.zeros((size, length + 1), np.int32), np.zeros((size, 2), np.int32)
        for b, (ids, first) in enumerate(chunk):
            tokens_BL[b, : len(ids)], ends_B2[b] = ids, (first, len(ids))
        key, weights = jax.random.fold_in(jax.random.key(0), done), speaker.weights
        scored = _step(speaker.graphdef, weights, tokens_BL, ends_B2, key, routing, width is None)
        found.append(jax.device_get(scored))  # the last batch alone has rows of padding
        done += len(chunk)
        of = f"{done:,} of {len(rows):,} sequences"
        reported = say(reported, f"{name}, routing {routing}: {of}")
    back = np.argsort(order)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _step(graphdef, weights, tokens_BL, ends_B2, key, routing, tasks):
    """Returns the results of `_scored`. ends_B2: first scored token, and number of tokens."""
    model, places_1L = nnx.merge(graphdef, weights), jnp.arange(1, tokens_BL.shape[1])[None]
    first_B1, end_B1 = ends_B2[:, :1], ends_B2[:, 1:]
    valid_BL = places_1L < end_B1
    scored_BL = valid_BL & (places_1L >= first_B1)
    # A layer that decides for a whole sequence of a task sees its context only.
    prompt_BL = places_1L <= first_B1 if tasks else None
    options = {"key": key, "routing": routing, "layer_loop": "scan" if tasks else "auto"}
    inputs = tokens_BL[:, :-1], valid_BL.astype(jnp.int32)
    x_BLD, records = model.features(*inputs, prompt_BL=prompt_BL, **options)
    arrays, vocab = (x_BLD, tokens_BL[:, 1:]), model.config.vocab_size
    signed_BL = in_chunks(_signed_nats, model.head, *arrays, numbers=vocab)
    nats_B = jnp.sum(jnp.where(scored_BL, jnp.abs(signed_BL), 0.0), axis=1)
    greedy_B = jnp.all(jnp.signbit(signed_BL) | ~scored_BL, axis=1)
    return nats_B, greedy_B, counts(records, valid_BL)


def _signed_nats(head: Callable, x_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each position; its sign bit marks the likeliest token."""
    logits_BLV = head(x_BLD)
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
    return jnp.where(jnp.argmax(logits_BLV, axis=2) == targets_BL, -nats_BL, nats_BL)
