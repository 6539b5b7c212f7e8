"""Sampling from a model, token by token: the whole generation is one compiled loop.

Any Flax NNX model will do that has a `reader` as modjax.Transformer has it, and a cache with its
positions_B and overflow_B.
Legend: B batch, L positions, O new tokens, V vocabulary, W slots of a cache.
"""

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.decoding.sampling import PLAIN, Sampling, draw_tokens
from modjax.errors import require
from modjax.nn.records import unmeasured

PAD = 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits_BV", "cache", "key", "step", "done_B", "recent_BW"),
    meta_fields=("max_length", "routing", "slack", "stop"),
)
@dataclass(frozen=True)
class State:
    """Where a generation stands; `resume` goes on from here, now or after it was saved."""

    logits_BV: jax.Array
    cache: Any
    key: jax.Array
    step: jax.Array
    done_B: jax.Array
    recent_BW: jax.Array
    max_length: int
    routing: str
    slack: float | None
    stop: tuple[tuple[int, ...], ...]


class Generated(NamedTuple):
    """tokens_BO: new tokens, up to and with a stop sequence, and then 0.

    depths_BO: routed blocks that processed each of them; -1 after the end. overflow_BO: those that
    it asked for in vain. prompt_depths_BL: depths of the prompt, None after `resume`. state: to go
    on from.
    """

    tokens_BO: jax.Array
    depths_BO: jax.Array
    overflow_BO: jax.Array
    prompt_depths_BL: jax.Array | None
    state: State


def generate(
    model: Any,
    params: Any,
    tokens_BL: Any,
    *,
    max_new_tokens: int,
    routing: str = "causal",
    lengths_B: Any = None,
    max_length: int | None = None,
    slack: float | None = None,
    sampling: Sampling = PLAIN,
    stop: tuple[tuple[int, ...], ...] = (),
    seed: int = 0,
) -> Generated:
    """Continues every prompt by up to `max_new_tokens` tokens.

    model, params: graph definition and parameters, `nnx.split(model)`.
    tokens_BL: prompts; row b has lengths_B[b] tokens and then padding (None: no padding).
    routing: "causal", by which each layer uses its own rule that never looks ahead, or the name of
      a rule, which those layers use that have it.
    max_length: of prompt and continuation, for which caches have room: more than this call needs
      where `resume` is to go on. slack: see Transformer.reader.
    stop: token sequences that end a row.
    Raises InputError for an empty prompt, one that does not fit, or "trained", before compiling.
    """
    tokens_BL, lengths_B = _rows(tokens_BL, lengths_B)
    length = tokens_BL.shape[1]
    longest, shortest = int(lengths_B.max()), int(lengths_B.min())
    room: int = max_length or longest + max_new_tokens
    require(shortest > 0, "prompt", "", "is empty: give at least one token")
    accepted = "must be causal, or the name of a rule; training looks at tokens not yet drawn"
    require(routing != "trained", "routing", routing, accepted)
    require(0 <= seed < 2**32, "seed", seed, "must be 0 or more, and below 2**32")
    require(
        slack is None or 0 < slack < math.inf, "slack", slack, "must be greater than 0, or None"
    )
    require(() not in stop, "stop", (), "is empty: give at least one token")
    _require_fits(longest, max_new_tokens, room)
    require(length <= room, "tokens_BL", length, f"is wider than max_length = {room}")
    config = getattr(nnx.merge(model, params), "config", None)
    by_threshold = config is not None and "threshold" in config.rules(routing)
    if by_threshold and (begun := unmeasured(params)):
        warnings.warn(
            f"{begun[0]} selects by a threshold that was never measured: training measures it, and "
            "in a loop of your own modjax.observe",
            stacklevel=2,
        )
    logits_BV, cache, prompt_depths_BL = _read_first(
        model,
        params,
        tokens_BL,
        jnp.asarray(lengths_B, jnp.int32),
        jax.random.key(seed),
        max_length=room,
        routing=routing,
        slack=slack,
    )
    state = State(
        logits_BV=logits_BV,
        cache=cache,
        key=jax.random.key(seed),
        step=jnp.int32(0),
        done_B=jnp.zeros(len(lengths_B), bool),
        recent_BW=jnp.full((len(lengths_B), max(map(len, stop), default=1)), -1, jnp.int32),
        max_length=room,
        routing=routing,
        slack=slack,
        stop=stop,
    )
    drawn = _draw(model, params, state, max_new_tokens, sampling)
    return drawn._replace(prompt_depths_BL=prompt_depths_BL)


def resume(
    model: Any, params: Any, state: State, *, max_new_tokens: int, sampling: Sampling
) -> Generated:
    """Goes on from a state as if `generate` had not stopped there, and takes its arrays over.

    Raises InputError where the new tokens do not fit the caches, before compiling.
    """
    _require_fits(int(jnp.max(state.cache.positions_B)), max_new_tokens, state.max_length)
    return _draw(model, params, state, max_new_tokens, sampling)


def _draw(model: Any, params: Any, state: State, new: int, sampling: Sampling) -> Generated:
    if new == 0:  # reading a prompt was all that was asked for
        none_BO = jnp.zeros((state.done_B.shape[0], 0), jnp.int32)
        return Generated(none_BO, none_BO, none_BO, None, state)
    tokens_BO, depths_BO, overflow_BO, state = _loop(model, params, state, new, sampling)
    return Generated(tokens_BO, depths_BO, overflow_BO, None, state)


def extend(model: Any, params: Any, state: State, tokens_BL: Any, lengths_B: Any = None) -> State:
    """Reads more text into a state: the next turn of a conversation, which `resume` answers.

    Row b takes lengths_B[b] >= 0 tokens (None: all), and goes on where it had stopped; a row that
    takes none stays as it is. Takes the state's arrays over.
    Raises InputError where the tokens do not fit the caches, before compiling.
    """
    tokens_BL, lengths_B = _rows(tokens_BL, lengths_B)
    batch, rows = len(lengths_B), state.done_B.shape[0]
    require(batch == rows, "tokens_BL", batch, f"must have a row for each of the state's {rows}")
    if lengths_B.max() == 0:
        return state
    used_B = np.asarray(state.cache.positions_B)
    row = int(np.argmax(used_B + lengths_B))
    _require_fits(int(used_B[row]), int(lengths_B[row]), state.max_length)
    return _read(model, params, state, tokens_BL, jnp.asarray(lengths_B, jnp.int32))


def _rows(tokens_BL: Any, lengths_B: Any) -> tuple[jax.Array, np.ndarray]:
    """Rows of tokens and their lengths, checked against each other."""
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    shape = tokens_BL.shape
    require(len(shape) == 2 and shape[0] > 0, "tokens_BL", shape, "must have the shape (B, L)")
    lengths_B = np.full(shape[0], shape[1]) if lengths_B is None else np.asarray(lengths_B)
    require(
        lengths_B.shape == shape[:1],
        "lengths_B",
        lengths_B.shape,
        f"must have one length for each of {shape[0]} rows",
    )
    least, most = int(lengths_B.min()), int(lengths_B.max())
    require(least >= 0, "lengths_B", least, "must be 0 or more")
    require(most <= shape[1], "lengths_B", most, f"must be at most their width, {shape[1]}")
    return tokens_BL, lengths_B


def _require_fits(used: int, more: int, max_length: int) -> None:
    require(more >= 0, "max_new_tokens", more, "must be 0 or more")
    require(
        used + more <= max_length,
        "prompt",
        f"{used} tokens",
        f"with {more} new ones does not fit the cache of max_length = {max_length}",
    )


@functools.partial(jax.jit, static_argnames=("model", "max_length", "routing", "slack"))
def _read_first(model, params, tokens_BL, lengths_B, key, *, max_length, routing, slack):
    read = nnx.merge(model, params).reader(
        max_length=max_length, routing=routing, slack=slack, key=key
    )
    return read(tokens_BL, lengths_B, None)


@functools.partial(jax.jit, static_argnames=("model", "new", "sampling"), donate_argnames="state")
def _loop(model, params, state, new, sampling):
    read = _reader(model, params, state)
    batch = state.done_B.shape[0]

    def more(carry):
        i, *_, state = carry
        return (i < new) & ~jnp.all(state.done_B)

    def draw(carry):
        i, tokens_BO, depths_BO, overflow_BO, state = carry
        active_B = ~state.done_B
        key = jax.random.fold_in(state.key, state.step)
        tokens_B = jnp.where(active_B, draw_tokens(state.logits_BV, key, sampling), PAD)
        ones_B = active_B.astype(jnp.int32)
        logits_BV, cache, depths_B1 = read(tokens_B[:, None], ones_B, state.cache)
        recent_BW = jnp.concatenate([state.recent_BW[:, 1:], tokens_B[:, None]], axis=1)
        missed_B = cache.overflow_B - state.cache.overflow_B
        state = dataclasses.replace(
            state,
            logits_BV=logits_BV,
            cache=cache,
            step=state.step + 1,
            done_B=state.done_B | _ends(recent_BW, state.stop),
            recent_BW=recent_BW,
        )
        depths_B = jnp.where(active_B, depths_B1[:, 0], -1)
        written = (
            jax.lax.dynamic_update_index_in_dim(all_BO, now_B, i, 1)
            for all_BO, now_B in (
                (tokens_BO, tokens_B),
                (depths_BO, depths_B),
                (overflow_BO, missed_B),
            )
        )
        return i + 1, *written, state

    zero_BO = jnp.zeros((batch, new), jnp.int32)
    start = (jnp.int32(0), jnp.full_like(zero_BO, PAD), zero_BO - 1, zero_BO, state)
    return jax.lax.while_loop(more, draw, start)[1:]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _read(model, params, state, tokens_BL, lengths_B):
    read = _reader(model, params, state)
    new_BV, cache, _ = read(tokens_BL, lengths_B, state.cache)
    logits_BV = jnp.where(lengths_B[:, None] > 0, new_BV, state.logits_BV)
    recent_BW = jnp.where(lengths_B[:, None] > 0, -1, state.recent_BW)  # no stop spans two turns
    done_B = state.done_B & (lengths_B == 0)
    return dataclasses.replace(
        state, logits_BV=logits_BV, cache=cache, done_B=done_B, recent_BW=recent_BW
    )


def _reader(model, params, state):
    return nnx.merge(model, params).reader(
        max_length=state.max_length, routing=state.routing, slack=state.slack, key=state.key
    )


def _ends(recent_BW: jax.Array, stop: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Whether each row ends with one of the stop sequences, (B,)."""
    ended_B = jnp.zeros(recent_BW.shape[0], bool)
    for sequence in stop:
        tail_BW = recent_BW[:, recent_BW.shape[1] - len(sequence) :]
        ended_B |= jnp.all(tail_BW == jnp.array(sequence, jnp.int32)[None], axis=1)
    return ended_B
