"""Generation of tokens in one compiled loop.

It works with any Flax NNX model that has a `reader` like modjax.Transformer's, and a cache with
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
from jax.core import Tracer

from modjax.decoding.sampling import PLAIN, Sampling, draw_tokens
from modjax.errors import require
from modjax.nn.records import module_and_name

PAD = 0
Stop = tuple[tuple[int, ...], ...]


class Reading(NamedTuple):
    """Arguments of a model's `reader`. They are static: each value compiles its own program."""

    max_length: int
    routing: str
    slack: float | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits_BV", "cache", "key", "step", "done_B", "recent_BW"),
    meta_fields=("reading", "stop"),
)
@dataclass(frozen=True)
class State:
    """State of a generation, which can be saved; `resume` and `extend` continue it.

    recent_BW: the last tokens, to find a stop sequence; here W is the longest one's length.
    """

    logits_BV: jax.Array
    cache: Any
    key: jax.Array
    step: jax.Array
    done_B: jax.Array
    recent_BW: jax.Array
    reading: Reading
    stop: Stop


class Generated(NamedTuple):
    """Result of a generation.

    tokens_BO: new tokens, up to and including a stop sequence, and then 0.
    depths_BO: number of routed blocks that processed each new token; -1 after the end.
    overflow_BO: number of routed blocks that had no free slot for each new token.
    prompt_depths_BL: depths of the prompt's tokens; None after `resume`.
    state: state to continue from.
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
    stop: Stop = (),
    seed: int = 0,
) -> Generated:
    """Continues every prompt by up to `max_new_tokens` tokens.

    model, params: graph definition and parameters, as `nnx.split(model)` returns them.
    tokens_BL: prompts. Row b has lengths_B[b] tokens and then padding; None means no padding.
    routing: "causal" lets each layer use its first causal rule. The name of a causal rule selects
      it in every layer that has it.
    max_length: capacity of the caches, for prompt and continuation. None fits this call; give more
      to continue with `resume` or `extend`.
    slack: see Transformer.reader.
    stop: token sequences that end a row.

    Raises InputError before compiling: for an empty prompt, one that does not fit, or "trained".
    """
    tokens_BL, lengths_B = _rows(tokens_BL, lengths_B)
    longest = int(lengths_B.max())
    reading = Reading(max_length or longest + max_new_tokens, routing, slack)
    require(lengths_B.min() > 0, "prompt", "", "is empty: give at least one token")
    _check(reading, stop, seed)
    _require_fits(longest, max_new_tokens, reading.max_length)
    accepted = f"is wider than max_length = {reading.max_length}"
    require(tokens_BL.shape[1] <= reading.max_length, "tokens_BL", tokens_BL.shape[1], accepted)
    _warn_of_unmeasured(model, params, routing)
    key, lengths_B = jax.random.key(seed), jnp.asarray(lengths_B, jnp.int32)
    logits_BV, cache, depths_BL = read_first(model, params, tokens_BL, lengths_B, key, reading)
    state = first_state(logits_BV, cache, key, reading, stop)
    drawn = _draw(model, params, state, max_new_tokens, sampling)
    return drawn._replace(prompt_depths_BL=depths_BL)


def resume(
    model: Any, params: Any, state: State, *, max_new_tokens: int, sampling: Sampling
) -> Generated:
    """Continues a generation as if it had not stopped. Donates the arrays of `state`.

    Raises InputError, before compiling, if the new tokens do not fit the caches.
    """
    used = int(jnp.max(state.cache.positions_B))
    _require_fits(used, max_new_tokens, state.reading.max_length)
    return _draw(model, params, state, max_new_tokens, sampling)


def extend(model: Any, params: Any, state: State, tokens_BL: Any, lengths_B: Any = None) -> State:
    """Reads more text, such as the next turn of a conversation. Donates the arrays of `state`.

    Row b reads lengths_B[b] >= 0 tokens, or all for None. A row that reads none is unchanged; the
    others are no longer done. Raises InputError, before compiling, if the tokens do not fit the
    caches.
    """
    tokens_BL, lengths_B = _rows(tokens_BL, lengths_B)
    batch, rows = len(lengths_B), state.done_B.shape[0]
    require(batch == rows, "tokens_BL", batch, f"must have a row for each of the state's {rows}")
    if lengths_B.max() == 0:
        return state
    used_B = np.asarray(state.cache.positions_B)
    row = int(np.argmax(used_B + lengths_B))
    _require_fits(int(used_B[row]), int(lengths_B[row]), state.reading.max_length)
    return _read(model, params, state, tokens_BL, jnp.asarray(lengths_B, jnp.int32))


def _rows(tokens_BL: Any, lengths_B: Any) -> tuple[jax.Array, np.ndarray]:
    """Returns rows of tokens and their lengths, after a check of both."""
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    shape = tokens_BL.shape
    require(len(shape) == 2 and shape[0] > 0, "tokens_BL", shape, "must have the shape (B, L)")
    lengths_B = np.full(shape[0], shape[1]) if lengths_B is None else np.asarray(lengths_B)
    accepted = f"must have one length for each of {shape[0]} rows"
    require(lengths_B.shape == shape[:1], "lengths_B", lengths_B.shape, accepted)
    least, most = int(lengths_B.min()), int(lengths_B.max())
    require(least >= 0, "lengths_B", least, "must be 0 or more")
    require(most <= shape[1], "lengths_B", most, f"must be at most their width, {shape[1]}")
    return tokens_BL, lengths_B


def _check(reading: Reading, stop: Stop, seed: int) -> None:
    routing, slack = reading.routing, reading.slack
    accepted = "must be causal, or the name of a rule; training looks at tokens not yet drawn"
    require(routing != "trained", "routing", routing, accepted)
    require(0 <= seed < 2**32, "seed", seed, "must be 0 or more, and below 2**32")
    positive = slack is None or 0 < slack < math.inf
    require(positive, "slack", slack, "must be greater than 0, or None")
    require(() not in stop, "stop", (), "is empty: give at least one token")


def _require_fits(used: int, more: int, max_length: int) -> None:
    require(more >= 0, "max_new_tokens", more, "must be 0 or more")
    accepted = f"with {more} new ones does not fit the cache of max_length = {max_length}"
    require(used + more <= max_length, "prompt", f"{used} tokens", accepted)


def _warn_of_unmeasured(model: Any, params: Any, routing: str) -> None:
    """Warns if the model selects by a threshold that training has not measured."""
    config = getattr(nnx.merge(model, params), "config", None)
    if config is None or "threshold" not in config.rules(routing):
        return
    for place, value in jax.tree_util.tree_leaves_with_path(params):
        path, name = module_and_name(place)
        if name == "threshold" and not isinstance(value, Tracer) and not jnp.any(value):
            said = "selects by a threshold that was never measured: training measures it, and in a"
            warnings.warn(f"{path} {said} loop of your own modjax.observe", stacklevel=3)
            return


def first_state(
    logits_BV: jax.Array, cache: Any, key: jax.Array, reading: Reading, stop: Stop
) -> State:
    batch, longest_stop = len(logits_BV), max(map(len, stop), default=1)
    done_B = jnp.zeros(batch, bool)
    recent_BW = jnp.full((batch, longest_stop), -1, jnp.int32)
    return State(logits_BV, cache, key, jnp.int32(0), done_B, recent_BW, reading, stop)


def _draw(model: Any, params: Any, state: State, new: int, sampling: Sampling) -> Generated:
    if new == 0:  # the prompt alone was to be read
        none_BO = jnp.zeros((state.done_B.shape[0], 0), jnp.int32)
        return Generated(none_BO, none_BO, none_BO, None, state)
    (tokens_BO, depths_BO, overflow_BO), state = draw_loop(model, params, state, new, sampling)
    return Generated(tokens_BO, depths_BO, overflow_BO, None, state)


@functools.partial(jax.jit, static_argnames=("model", "reading"))
def read_first(model, params, tokens_BL, lengths_B, key, reading):
    read = nnx.merge(model, params).reader(**reading._asdict(), key=key)
    return read(tokens_BL, lengths_B, None)


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


@functools.partial(jax.jit, static_argnames=("model", "new", "sampling"), donate_argnames="state")
def draw_loop(model, params, state, new, sampling):
    """Draws up to `new` tokens: returns (tokens, depths, overflows), (B, O) each, and the state."""
    read = _reader(model, params, state)

    def more(carry):
        i, _, state = carry
        return (i < new) & ~jnp.all(state.done_B)

    def draw(carry):
        i, drawn, state = carry
        active_B = ~state.done_B
        key = jax.random.fold_in(state.key, state.step)
        tokens_B = jnp.where(active_B, draw_tokens(state.logits_BV, key, sampling), PAD)
        ones_B = active_B.astype(jnp.int32)
        logits_BV, cache, depths_B1 = read(tokens_B[:, None], ones_B, state.cache)
        depths_B = jnp.where(active_B, depths_B1[:, 0], -1)
        overflow_B = cache.overflow_B - state.cache.overflow_B
        drawn = [
            jax.lax.dynamic_update_index_in_dim(all_BO, now_B, i, 1)
            for all_BO, now_B in zip(drawn, (tokens_B, depths_B, overflow_B), strict=True)
        ]
        recent_BW = jnp.concatenate([state.recent_BW[:, 1:], tokens_B[:, None]], axis=1)
        state = dataclasses.replace(
            state,
            logits_BV=logits_BV,
            cache=cache,
            step=state.step + 1,
            done_B=state.done_B | _ends(recent_BW, state.stop),
            recent_BW=recent_BW,
        )
        return i + 1, drawn, state

    zero_BO = jnp.zeros((state.done_B.shape[0], new), jnp.int32)
    drawn = [jnp.full_like(zero_BO, PAD), zero_BO - 1, zero_BO]
    return jax.lax.while_loop(more, draw, (jnp.int32(0), drawn, state))[1:]


def _reader(model, params, state):
    return nnx.merge(model, params).reader(**state.reading._asdict(), key=state.key)


def _ends(recent_BW: jax.Array, stop: Stop) -> jax.Array:
    """Returns whether each row ends with one of the stop sequences, (B,)."""
    ended_B = jnp.zeros(recent_BW.shape[0], bool)
    for sequence in stop:
        tail_BW = recent_BW[:, recent_BW.shape[1] - len(sequence) :]
        ended_B |= jnp.all(tail_BW == jnp.array(sequence, jnp.int32)[None], axis=1)
    return ended_B
