"""Probe that finds layers that look ahead: an edit of one position must not move earlier outputs.

A spec claims under which routings its layer never looks ahead. A layer from outside can claim this
wrongly, and its loss would then look better than any honest one.

Legend: B batch, L positions, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.errors import InputError
from modjax.nn.lm import Transformer
from modjax.nn.params import Measured
from modjax.specs import Layer, ModelSpec
from modjax.specs.imports import user_code

LENGTH, VOCAB = 32, 40
TINY = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 32}
# Rounding moves an output by less: routed layers have programs for several sizes.
TOLERANCE = 1e-4
# Noise on the weights, as a gate that starts at 0 would hide what is behind it. The second value
# is for layers whose output the first one makes infinite.
SPREADS = (0.3, 0.01)
# Each program runs some thirty times on small arrays: optimising it costs more than it saves.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


class Leak(NamedTuple):
    """Effect of an edit on a position that must not see it.

    edited: edited position.
    position: position whose logits moved; None for a position of another sequence.
    moved: how far they moved, as a fraction of the largest logit.
    """

    edited: int
    position: int | None
    moved: float

    def __str__(self) -> str:
        where = "another sequence" if self.position is None else f"position {self.position}"
        return f"an edit of position {self.edited} moves {where} by {self.moved:.1%}"


class Finding(NamedTuple):
    """Result of probing a layer under one routing.

    claims: whether the layer's spec claims that it never looks ahead there.
    leak: largest leak, or None if there is none.
    """

    layer: str
    routing: str
    claims: bool
    leak: Leak | None


def alone(models: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Returns a model for every distinct layer, in which that layer is the last.

    Before it come the layers that pass it the values it needs.
    """
    found: dict[tuple[str, ...], ModelSpec] = {}
    for model in models:
        for segment in model.segments:
            for index, layer in enumerate(segment.parts):
                before, needed = [], layer.needs()
                for part in reversed(segment.parts[:index]):
                    if part.passes_on() & needed:
                        before.insert(0, part)
                        needed |= part.needs()
                one = _with_layers(model, (*before, layer))
                found.setdefault((*map(str, one.layers), str(one.ends)), one)
    return list(found.values())


def probe(model: ModelSpec, length: int) -> list[Finding]:
    """Returns a finding for each routing of the last layer of `model`.

    A tiny copy of the model is probed. If a layer refuses its shape, the copy has the model's own
    widths and reads `length` tokens. Raises InputError for a layer that runs in neither shape.
    """
    code = "model.layers", str(model.layers[-1]), "cannot run"
    try:
        with user_code(*code):
            return _findings(_with_layers(model, model.layers, head_dim=None, **TINY), LENGTH)
    except InputError:  # a layer from outside may want another shape
        with user_code(*code):
            return _findings(_with_layers(model, model.layers, vocab_size=VOCAB), length)


def broken(finding: Finding) -> InputError | None:
    """Returns the error of a layer that looks ahead although it claims not to, or None."""
    if not finding.claims or finding.leak is None:
        return None
    accepted = (
        f"looks ahead under routing {finding.routing!r}, where it claims not to: {finding.leak}; "
        "the looks_ahead() of its spec must say so"
    )
    return InputError("model.layers", finding.layer, accepted)


def _with_layers(model: ModelSpec, layers: tuple[Layer, ...], **shape: Any) -> ModelSpec:
    depth, dtype = len(layers), "float32"
    return dataclasses.replace(model, layers=layers, num_layers=depth, dtype=dtype, **shape)


def _findings(model: ModelSpec, length: int) -> list[Finding]:
    def make() -> Transformer:
        return Transformer(model, rngs=nnx.Rngs(0))

    graphdef = nnx.split(nnx.eval_shape(make))[0]
    initial = jax.jit(lambda: nnx.split(make())[1], compiler_options=QUICK)()
    tokens_BL = np.random.default_rng(0).integers(0, VOCAB, (2, length))
    leaks: dict[str, Leak | None] = {}  # by program: most routings share one
    layer, findings = model.layers[-1], []
    for routing in model.routings:

        def run(state: Any, tokens_BL: jax.Array, routing: str = routing) -> jax.Array:
            network = nnx.merge(graphdef, state)
            options = {"key": jax.random.key(0), "routing": routing, "layer_loop": "scan"}
            return network(tokens_BL, **options)[0]

        with jax.default_matmul_precision("highest"):  # TOLERANCE is for float32 products
            program = jax.jit(run).lower(initial, tokens_BL)
        text = program.as_text()
        if text not in leaks:
            leaks[text] = _largest_leak(initial, program.compile(QUICK), tokens_BL)
        claims = not layer.looks_ahead("trained" if routing == "trained" else "causal")
        findings.append(Finding(str(layer), routing, claims, leaks[text]))
    return findings


def _largest_leak(initial: Any, run: Any, tokens_BL: np.ndarray) -> Leak | None:
    """Returns the largest leak to an earlier position or to the other sequence, if any.

    Edits each position in turn, but only some of a long sequence.
    """
    for spread in SPREADS:
        weights = _with_noise(initial, spread)
        before_BLV = np.asarray(run(weights, tokens_BL))
        if np.isfinite(before_BLV).all():
            break
    else:
        raise ValueError("its output is not finite")
    scale, leaks, length = np.abs(before_BLV).max(), [], tokens_BL.shape[1]
    some = np.random.default_rng(0).permutation(np.arange(1, length))[: 2 * LENGTH]
    for edited in sorted({*some.tolist(), length - 1}):
        edit_BL = tokens_BL.copy()
        edit_BL[0, edited] = (tokens_BL[0, edited] + 7) % VOCAB
        moved_BL = np.abs(np.asarray(run(weights, edit_BL)) - before_BLV).max(axis=2) / scale
        first = int(moved_BL[0, :edited].argmax())
        leaks.append(Leak(edited, first, float(moved_BL[0, first])))
        leaks.append(Leak(edited, None, float(moved_BL[1].max())))
    worst = max(leaks, key=lambda leak: leak.moved)
    return worst if worst.moved > TOLERANCE else None


def _with_noise(state: Any, spread: float) -> Any:
    """Returns a state with noise added to all parameters and measured numbers."""
    rng = np.random.default_rng(0)

    def noisy(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + rng.normal(0, spread, leaf.shape).astype(leaf.dtype)

    numbers, rest = nnx.split_state(state, nnx.Any(nnx.Param, Measured), ...)
    return nnx.merge_state(jax.tree.map(noisy, numbers), rest)
