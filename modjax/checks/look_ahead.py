"""Whether a layer looks ahead: an edit of one position must move no output before it.

A spec claims under which routings its layer never looks ahead, and a layer from outside can claim
what is not so: its loss would look better than any honest one.

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
# Weights away from their start, where a gate of 0 would hide what is behind it.
SPREADS = (0.3, 0.01)
# Each program runs some thirty times on small arrays: optimising it costs more than it saves.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


class Leak(NamedTuple):
    """An edit of position `edited` moved the logits of another one by `moved`, of their largest.

    position: the one that moved; None: it belongs to another sequence.
    """

    edited: int
    position: int | None
    moved: float

    def __str__(self) -> str:
        where = "another sequence" if self.position is None else f"position {self.position}"
        return f"an edit of position {self.edited} moves {where} by {self.moved:.1%}"


class Finding(NamedTuple):
    """A layer's claim under one routing, and the probe's result.

    claims: whether it says that it never looks ahead there. leak: None where none was seen.
    """

    layer: str
    routing: str
    claims: bool
    leak: Leak | None


def alone(models: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Returns a model for every distinct layer of these, of which it is the last.

    Before it stand the layers of its segment that hand on what it needs.
    """
    found: dict[tuple[str, ...], ModelSpec] = {}
    for model in models:
        for segment in model.segments:
            for index, layer in enumerate(segment.parts):
                before, needed = [], layer.needs()
                for part in reversed(segment.parts[:index]):
                    if part.hands_on() & needed:
                        before.insert(0, part)
                        needed |= part.needs()
                one = _with_layers(model, (*before, layer))
                found.setdefault((*map(str, one.layers), str(one.ends)), one)
    return list(found.values())


def probe(model: ModelSpec, length: int) -> list[Finding]:
    """Edits tokens before the last layer of a model, under every routing that the layer has.

    The model is made tiny, or where it cannot be, keeps its own widths and reads sequences of
    `length` tokens. Raises InputError for a layer that runs in neither.
    """
    code = "model.layers", str(model.layers[-1]), "cannot run"
    try:
        with user_code(*code):
            return _findings(_with_layers(model, model.layers, head_dim=None, **TINY), LENGTH)
    except InputError:  # a layer of the user's own may want another shape, and say so in any way
        with user_code(*code):
            return _findings(_with_layers(model, model.layers, vocab_size=VOCAB), length)


def broken(finding: Finding) -> InputError | None:
    """Returns the error of a layer that looks ahead where it claims not to, or None."""
    if not finding.claims or finding.leak is None:
        return None
    return InputError(
        "model.layers",
        finding.layer,
        f"looks ahead under routing {finding.routing!r}, where it claims not to: {finding.leak}; "
        "the looks_ahead() of its spec must say so",
    )


def _with_layers(model: ModelSpec, layers: tuple[Layer, ...], **shape: Any) -> ModelSpec:
    depth, dtype = len(layers), "float32"
    return dataclasses.replace(model, layers=layers, num_layers=depth, dtype=dtype, **shape)


def _findings(model: ModelSpec, length: int) -> list[Finding]:
    """Returns a finding for each routing of the model's last layer."""
    layer = model.layers[-1]

    def make() -> Transformer:
        return Transformer(model, rngs=nnx.Rngs(0))

    graphdef = nnx.split(nnx.eval_shape(make))[0]
    born = jax.jit(lambda: nnx.split(make())[1], compiler_options=QUICK)()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, length))
    leaks: dict[str, Leak | None] = {}  # by program: most routings share one
    findings = []
    for routing in model.routings:

        def run(state: Any, tokens_BL: jax.Array, routing: str = routing) -> jax.Array:
            network = nnx.merge(graphdef, state)
            options = {"key": jax.random.key(0), "routing": routing, "layer_loop": "scan"}
            return network(tokens_BL, **options)[0]

        with jax.default_matmul_precision("highest"):  # TOLERANCE is for float32 products
            program = jax.jit(run).lower(born, tokens)
        text = program.as_text()
        if text not in leaks:
            leaks[text] = _leak(born, program.compile(QUICK), tokens)
        claims = not layer.looks_ahead("trained" if routing == "trained" else "causal")
        findings.append(Finding(str(layer), routing, claims, leaks[text]))
    return findings


def _leak(born: Any, run: Any, tokens_BL: np.ndarray) -> Leak | None:
    """Returns the largest move of an output before the edit, or in the other sequence.

    None where all are within TOLERANCE. Long sequences are edited at some positions only.
    """
    for spread in SPREADS:
        weights = _moved(born, spread)
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


def _moved(weights: Any, spread: float) -> Any:
    """Returns the weights with noise added to all trained and measured numbers."""
    rng = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param | Measured) or not jnp.issubdtype(
            leaf.dtype, jnp.floating
        ):
            return leaf
        noise = rng.normal(0, spread, leaf.shape).astype(leaf.dtype)
        return leaf.replace(np.asarray(leaf[...]) + noise)

    return jax.tree.map(one, weights, is_leaf=lambda node: isinstance(node, nnx.Variable))
