"""The loss of a pretrained model without one of its sublayers or blocks."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from modjax.data.progress import say
from modjax.data.token_cache import cache_dir, check_vocab, open_cache
from modjax.nn.weights import places
from modjax.pretrained import pretrained_spec
from modjax.pretrained.tensors import abstract, by_number
from modjax.specs import Execution, RunSpec, Seq, Skip, Zero
from modjax.specs.layer import segments_of
from modjax.training.base_weights import initial_state
from modjax.training.mesh import make_mesh
from modjax.training.programs import compile_eval_step
from modjax.training.results.evaluate import difference, evaluate, summarise, validation_batches
from modjax.training.state import abstract_model, joined


class Without(NamedTuple):
    """The loss of a model without a part of it, in nats per token of held-out text.

    part: "attention", "mlp" or "block". layer: the number of its block.
    loss, increase, sem: the loss, how much larger it is than the whole model's, and the standard
      error of that.
    """

    part: str
    layer: int
    loss: float
    increase: float
    sem: float


def measure_layers(spec: RunSpec, data_dir: Path) -> list[Without]:
    """Drops each attention, each MLP and each block of a pretrained model, one at a time.

    spec: a run whose base is the model. Its data and its evaluation are used, but not its layers.
    Returns the results by their increase of the loss.
    """
    whole = pretrained_spec(str(spec.base), spec.model.dtype)
    # One program serves all: a Skip drops its sublayer if its threshold is infinite.
    blocks: list[Any] = whole.blocks()
    skips = [Seq(*(Skip(part, router=Zero()) for part in block.parts)) for block in blocks]
    spec = dataclasses.replace(spec, model=dataclasses.replace(whole, layers=segments_of(skips)))
    cache = open_cache(cache_dir(data_dir, spec.data))
    check_vocab(cache, spec.model)
    mesh, model = make_mesh(Execution(data=1)), abstract_model(spec.model, "routers")
    found = {name: p for name, p in places(abstract(spec.model)).items() if "threshold" in name}
    names = sorted(found, key=by_number)  # those of attention and MLP, block by block
    with jax.set_mesh(mesh):
        state = initial_state(mesh, model, spec)
        step = compile_eval_step(mesh, model, spec.train, layer_loop="auto", routing="trained")
        batches = list(validation_batches(cache, spec.train, mesh))

        def scores(dropped: tuple[str, ...]) -> Any:
            measured = jax.tree.map(lambda x: np.full(x.shape, -np.inf, x.dtype), state.measured)
            for place in map(found.__getitem__, dropped):
                place.parameter(measured)[place.index] = np.inf
            return evaluate(step, joined(state.params, state.frozen, measured), batches)

        all_of_it, results, reported = scores(()), [], time.monotonic()
        for i, pair in enumerate(zip(names[::2], names[1::2], strict=True)):
            parts = {"attention": pair[:1], "mlp": pair[1:], "block": pair}
            for part, dropped in parts.items():
                one = scores(dropped)
                gap = difference(one, all_of_it)
                results.append(Without(part, i, summarise(one).loss, gap.loss, gap.sem))
            reported = say(reported, f"measured {i + 1} of {len(blocks)} blocks")
    return sorted(results, key=lambda result: result.increase)
