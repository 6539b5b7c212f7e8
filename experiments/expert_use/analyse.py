"""Which tokens a trained MoDE sends to which expert, and which it lets pass.

Usage: python -m experiments.expert_use.analyse WORKDIR DATA_DIR NAME
  WORKDIR holds a finished configs/expert_use run on data prepared in DATA_DIR; the results are
  NAME.png, NAME.html and NAME.json beside this file.
Legend: B batch, L positions, A layers, E experts, V tokens, N sequences.
"""

import html
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

from modjax.finished.runs import Finished, choose, open_run
from modjax.finished.text import open_codec
from modjax.records import read_metrics, run_dir
from modjax.scaling.report.markers import COLOURS, RC
from modjax.training.results.evaluate import validation_batches

HERE = Path(__file__).parent
SHOWN = 4  # sequences on the page
LEAST = 50  # times that a token must come to be counted


def look(run: Finished) -> tuple[np.ndarray, np.ndarray]:
    """The expert of every token of the validation windows in each layer, (A, N, L), and tokens.

    The number of experts where it picked none; nothing is dropped here.
    """

    @jax.jit
    def forward(weights, inputs_BL):
        _, records = nnx.merge(run.model.graphdef, weights)(inputs_BL, routing="router")
        (routing,) = records.values()
        return routing.experts_BSK[..., 0]

    batches = list(validation_batches(run.cache, run.spec.train, run.mesh))
    experts_ANL = np.concatenate([forward(run.weights, b.inputs_BL) for b in batches], axis=1)
    return experts_ANL, np.concatenate([b.inputs_BL for b in batches])


def summary(experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, codec: Any) -> dict:
    counts = np.bincount(tokens_NL.ravel())
    common = np.flatnonzero(counts >= LEAST)
    pieces = dict(zip(common, codec.pieces([int(t) for t in common]), strict=True))

    def shown(share_V: dict[int, float], most: bool) -> list:
        best = sorted(share_V, key=share_V.__getitem__, reverse=most)[:10]
        return [[pieces[t].decode(errors="replace"), round(share_V[t], 3)] for t in best]

    no_op_V = {t: float((experts_ANL[:, tokens_NL == t] == none).mean()) for t in common}
    layers = []
    for experts_NL in experts_ANL:
        load_E = np.bincount(experts_NL.ravel(), minlength=none + 1) / experts_NL.size
        of_token = {t: np.bincount(experts_NL[tokens_NL == t], minlength=none + 1) for t in common}
        joint_VE = np.stack(list(of_token.values())) / sum(of_token.values()).sum()
        independent_VE = joint_VE.sum(1, keepdims=True) * joint_VE.sum(0, keepdims=True)
        known = joint_VE > 0
        bits = np.sum(joint_VE[known] * np.log2(joint_VE[known] / independent_VE[known]))
        each = [
            shown({t: float(n[e] / n.sum()) for t, n in of_token.items()}, most=True)
            for e in range(none)
        ]
        layers.append(
            {
                "load": load_E.round(4).tolist(),
                "bits_that_a_token_tells_of_its_expert": round(float(bits), 3),
                "bits_of_the_expert": round(float(-np.sum(load_E * np.log2(load_E + 1e-12))), 3),
                "tokens_of_each_expert": each,
            }
        )
    return {
        "no_op_share_by_layer": (experts_ANL == none).mean(axis=(1, 2)).round(4).tolist(),
        "passed_most": shown(no_op_V, most=True),
        "passed_least": shown(no_op_V, most=False),
        "layers": layers,
    }


def draw(
    folder: Path, experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, path: Path
) -> None:
    layers = len(experts_ANL)
    lines = [line.values for line in read_metrics(folder)]
    lines = [line for line in lines if line and "moe/most_load" in line]
    with plt.rc_context(RC):
        figure, axes = plt.subplots(2, 2, figsize=(16 / 2.54, 11 / 2.54))
        load, training, by_depth, by_token = axes.ravel()
        load_AE = np.stack(
            [np.bincount(e.ravel(), minlength=none + 1) / e.size for e in experts_ANL]
        )
        bottom_A = np.zeros(layers)
        for e in range(none + 1):
            label = f"expert {e}" if e < none else "no-op"
            colour = COLOURS[e] if e < none else "#d4d4d4"
            load.bar(range(layers), load_AE[:, e], bottom=bottom_A, color=colour, label=label)
            bottom_A += load_AE[:, e]
        load.set(xlabel="layer", ylabel="share of tokens", xticks=range(layers))
        load.legend(ncols=3, fontsize=5.5, loc="lower center", bbox_to_anchor=(0.5, 1))
        steps = [line["step"] for line in lines]
        for i, (name, label) in enumerate(
            (("most_load", "largest load / mean"), ("dropped", "dropped"), ("no_op", "no-op"))
        ):
            values = [line[f"moe/{name}"] for line in lines]
            training.plot(steps, values, color=COLOURS[i], label=label)
        training.set(xlabel="step", ylabel="ratio, or share of picks")
        training.legend()
        passed_AL = (experts_ANL == none).mean(axis=1)
        for a in range(layers):
            by_depth.plot(passed_AL[a], color=plt.cm.viridis(a / layers), linewidth=0.6)
        by_depth.set(xlabel="position (dark: first layer)", ylabel="no-op share")
        counts = np.bincount(tokens_NL.ravel())
        common = np.flatnonzero(counts >= LEAST)
        shares = [(experts_ANL[:, tokens_NL == t] == none).mean() for t in common]
        by_token.scatter(counts[common], shares, s=3, color=COLOURS[0])
        by_token.set(xscale="log", xlabel="times a token comes", ylabel="no-op share, all layers")
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def page(experts_ANL: np.ndarray, tokens_NL: np.ndarray, none: int, codec: Any, name: str) -> str:
    """Text coloured by the expert of a middle layer, self-contained; no-ops are not coloured."""
    layer = len(experts_ANL) // 2
    colours = [*(f"{colour}66" for colour in COLOURS[:none]), "transparent"]
    bodies = []
    for n in range(SHOWN):
        pieces = codec.pieces([int(t) for t in tokens_NL[n]])
        texts = [html.escape(piece.decode(errors="replace")) for piece in pieces]
        spans = [
            f'<span style="background:{colours[e]}">{text}</span>'
            for text, e in zip(texts, experts_ANL[layer, n], strict=True)
        ]
        bodies.append(f"<pre>{''.join(spans)}</pre>")
    legend = "".join(
        f'<span style="background:{colour}">&nbsp;{"no-op" if e == none else e}&nbsp;</span>'
        for e, colour in enumerate(colours)
    )
    title = html.escape(f"The expert of each byte in layer {layer}: {name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:14px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "pre{white-space:pre-wrap;border:1px solid #ddd;padding:1rem}</style>"
        f"<h1>{title}</h1><p>{legend}</p>{''.join(bodies)}</html>\n"
    )


def main(workdir: Path, data_dir: Path, name: str) -> None:
    (spec,) = choose(workdir, None)
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
