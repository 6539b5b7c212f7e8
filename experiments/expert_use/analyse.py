"""Which tokens a trained MoDE sends to which expert, and which it lets pass.

Usage: python -m experiments.expert_use.analyse WORKDIR DATA_DIR NAME
WORKDIR holds a finished run of configs/expert_use.py on data prepared in DATA_DIR. Writes NAME.png,
NAME.html and NAME.json beside this file.

Legend: B batch, L positions, P picks of a position, A layers, E experts and the no-op, V tokens,
N sequences.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from flax import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments import coloured_text
from modjax.finished.runs import Finished, choose, open_run
from modjax.finished.text import open_codec
from modjax.metrics_file import read_metrics
from modjax.records import run_dir
from modjax.scaling.report.markers import COLOURS, RC
from modjax.training.results.evaluate import validation_batches

HERE = Path(__file__).parent
SHOWN = 4  # sequences on the page
LEAST = 50  # occurrences that a token needs to be counted


def look(run: Finished) -> tuple[np.ndarray, np.ndarray]:
    """Returns the expert of every validation token in each layer, (A, N, L), and the tokens (N, L).

    A no-op has the number of experts as its index. Causal routing drops nothing.
    """

    @jax.jit
    def forward(weights, inputs_BL):
        _, records = nnx.merge(run.model.graphdef, weights)(inputs_BL, routing="causal")
        (experts,) = (record for record in records.values() if hasattr(record, "experts_BLP"))
        return experts.experts_BLP[..., 0]

    batches = list(validation_batches(run.cache, run.spec.train, run.mesh))
    experts_ANL = np.concatenate([forward(run.weights, b.inputs_BL) for b in batches], axis=1)
    return experts_ANL, np.concatenate([b.inputs_BL for b in batches])


def common_tokens(tokens_NL: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.bincount(tokens_NL.ravel()) >= LEAST)


def no_op_share(experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int) -> dict[int, float]:
    """Returns the share of no-ops over all layers, for each common token."""
    return {
        token: float((experts_ANL[:, tokens_NL == token] == none).mean())
        for token in common_tokens(tokens_NL)
    }


def loads(experts_ANL: np.ndarray, none: int) -> np.ndarray:
    """Returns each layer's share of tokens for every expert and the no-op, (A, E)."""
    return np.stack([np.bincount(e.ravel(), minlength=none + 1) / e.size for e in experts_ANL])


def summary(experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, codec: Any) -> dict:
    common = common_tokens(tokens_NL)
    names = dict(zip(common, coloured_text.texts(codec, common), strict=True))

    def shown(share_V: dict[int, float], most: bool) -> list:
        ordered = sorted(share_V, key=share_V.__getitem__, reverse=most)[:10]
        return [[names[t], round(float(share_V[t]), 3)] for t in ordered]

    layers = []
    for experts_NL, load_E in zip(experts_ANL, loads(experts_ANL, none), strict=True):
        counts_VE = np.stack(
            [np.bincount(experts_NL[tokens_NL == t], minlength=none + 1) for t in common]
        )
        share_VE = counts_VE / counts_VE.sum(1, keepdims=True)
        each = [shown(dict(zip(common, share_VE[:, e], strict=True)), True) for e in range(none)]
        bits = mutual_information(counts_VE / counts_VE.sum())
        layers.append(
            {
                "load": load_E.round(4).tolist(),
                "bits_that_a_token_tells_of_its_expert": round(bits, 3),
                "bits_of_the_expert": round(float(-np.sum(load_E * np.log2(load_E + 1e-12))), 3),
                "tokens_of_each_expert": each,
            }
        )
    no_op_V = no_op_share(experts_ANL, tokens_NL, none)
    return {
        "no_op_share_by_layer": (experts_ANL == none).mean(axis=(1, 2)).round(4).tolist(),
        "passed_most": shown(no_op_V, most=True),
        "passed_least": shown(no_op_V, most=False),
        "layers": layers,
    }


def mutual_information(joint_VE: np.ndarray) -> float:
    """Returns the mutual information of token and expert, in bits."""
    independent_VE = joint_VE.sum(1, keepdims=True) * joint_VE.sum(0, keepdims=True)
    known = joint_VE > 0
    return float(np.sum(joint_VE[known] * np.log2(joint_VE[known] / independent_VE[known])))


def draw(
    folder: Path, experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, path: Path
) -> None:
    with plt.rc_context(RC):
        figure, axes = plt.subplots(2, 2, figsize=(16 / 2.54, 11 / 2.54))
        load, training, by_depth, by_token = axes.ravel()
        draw_loads(load, loads(experts_ANL, none))
        draw_training(training, folder)
        for a, passed_L in enumerate((experts_ANL == none).mean(axis=1)):
            colour = plt.cm.viridis(a / len(experts_ANL))
            by_depth.plot(passed_L, color=colour, linewidth=0.6)
        by_depth.set(xlabel="position (dark: first layer)", ylabel="no-op share")
        shares = no_op_share(experts_ANL, tokens_NL, none)
        counts = np.bincount(tokens_NL.ravel())[list(shares)]
        by_token.scatter(counts, list(shares.values()), s=3, color=COLOURS[0])
        by_token.set(xscale="log", xlabel="times a token comes", ylabel="no-op share, all layers")
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def draw_loads(ax: Axes, load_AE: np.ndarray) -> None:
    layers, none = range(len(load_AE)), load_AE.shape[1] - 1
    bottom_A = np.zeros(len(load_AE))
    for e, load_A in enumerate(load_AE.T):
        label, colour = (f"expert {e}", COLOURS[e]) if e < none else ("no-op", "#d4d4d4")
        ax.bar(layers, load_A, bottom=bottom_A, color=colour, label=label)
        bottom_A += load_A
    ax.set(xlabel="layer", ylabel="share of tokens", xticks=layers)
    ax.legend(ncols=3, fontsize=5.5, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_training(ax: Axes, folder: Path) -> None:
    lines = [line.values or {} for line in read_metrics(folder)]
    lines = [line for line in lines if "moe/most_load" in line]
    labels = {"most_load": "largest load / mean", "dropped": "dropped", "no_op": "no-op"}
    for (name, label), colour in zip(labels.items(), COLOURS, strict=False):
        values = [line[f"moe/{name}"] for line in lines]
        ax.plot([line["step"] for line in lines], values, color=colour, label=label)
    ax.set(xlabel="step", ylabel="ratio, or share of picks")
    ax.legend()


def page(experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, codec: Any, name: str) -> str:
    """Returns text coloured by the expert of a middle layer. No-ops are not coloured."""
    layer = len(experts_ANL) // 2
    colours = [*(f"{colour}66" for colour in COLOURS[:none]), "transparent"]
    sequences = [
        [
            (text, colours[e], "")
            for text, e in zip(coloured_text.texts(codec, tokens_L), experts_L, strict=True)
        ]
        for tokens_L, experts_L in zip(tokens_NL[:SHOWN], experts_ANL[layer, :SHOWN], strict=True)
    ]
    legend = zip([*map(str, range(none)), "no-op"], colours, strict=True)
    title = f"The expert of each byte in layer {layer}: {name}"
    return coloured_text.page(title, "", legend, sequences)


def main(workdir: Path, data_dir: Path, name: str) -> None:
    (spec,) = choose(workdir, None).specs
    run = open_run(spec, workdir=workdir, data_dir=data_dir)
    codec = open_codec(run)
    experts_ANL, tokens_NL = look(run)
    none = spec.model.layers[0].parts[1].experts
    found = summary(experts_ANL, tokens_NL, none, codec)
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    folder = run_dir(workdir, spec.run_id)
    draw(folder, experts_ANL, tokens_NL, none, HERE / f"{name}.png")
    (HERE / f"{name}.html").write_text(page(experts_ANL, tokens_NL, none, codec, name))
    print(json.dumps({k: v for k, v in found.items() if k != "layers"}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
