"""Figure 5: where a trained model spends its depth.

Usage: python -m experiments.fig5_routing.analyse WORKDIR DATA_DIR NAME
  WORKDIR holds a finished configs/fig5_routing run on data prepared in DATA_DIR; the results are
  NAME.png, NAME.html and NAME.json beside this file.
Legend: B batch, L positions, A routed blocks, V vocabulary, N sequences.
"""

import html
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from modjax.finished.runs import Finished, choose, open_run
from modjax.finished.text import open_codec
from modjax.scaling.report.markers import COLOURS, RC
from modjax.training.results.evaluate import validation_batches

HERE = Path(__file__).parent
SHOWN = 4  # sequences in the map and on the page
ROUTINGS = ("trained", "predictor")


def look(run: Finished, routing: str) -> dict[str, np.ndarray]:
    """Over the validation windows: what was selected, raw scores, loss and entropy of each token.

    selected_ANL and scores_ANL per routed block; tokens_NL, loss_NL and entropy_NL in nats.
    """

    @jax.jit
    def forward(weights, inputs_BL, targets_BL):
        logits_BLV, records = nnx.merge(run.model.graphdef, weights)(inputs_BL, routing=routing)
        log_p_BLV = jax.nn.log_softmax(logits_BLV)
        loss_BL = -jnp.take_along_axis(log_p_BLV, targets_BL[..., None], axis=2)[..., 0]
        entropy_BL = -jnp.sum(jnp.exp(log_p_BLV) * log_p_BLV, axis=2)
        (routed,) = records.values()
        return routed.selected_BL, routed.scores_BL, loss_BL, entropy_BL

    parts = []
    for batch in validation_batches(run.cache, run.spec.train, run.mesh):
        found = forward(run.weights, batch.inputs_BL, batch.targets_BL)
        parts.append([*(np.asarray(x) for x in found), batch.inputs_BL])
    names = ("selected_ANL", "scores_ANL", "loss_NL", "entropy_NL", "tokens_NL")
    dims = (1, 1, 0, 0, 0)
    return {
        name: np.concatenate([part[i] for part in parts], axis=dims[i])
        for i, name in enumerate(names)
    }


def summary(seen: dict[str, np.ndarray], codec: Any) -> dict[str, Any]:
    depth_NL = seen["selected_ANL"].sum(0)
    length = depth_NL.shape[1]
    sigmoid_ANL = 1 / (1 + np.exp(-seen["scores_ANL"]))
    position_NL = np.broadcast_to(np.arange(length), depth_NL.shape)

    def correlation(other_NL):
        return float(np.corrcoef(depth_NL.ravel(), other_NL.ravel())[0, 1])

    counts, totals = np.bincount(seen["tokens_NL"].ravel()), {}
    for token in np.flatnonzero(counts >= 50):
        totals[token] = float(depth_NL[seen["tokens_NL"] == token].mean())
    ordered = sorted(totals, key=totals.__getitem__)

    def shown(tokens):
        pieces = codec.pieces([int(t) for t in tokens])
        return [
            [piece.decode(errors="replace"), round(totals[t], 3), int(counts[t])]
            for t, piece in zip(tokens, pieces, strict=True)
        ]

    # Of the variance of depth, how much do the token's identity and its position explain alone?
    def explained(group_NL):
        sums = np.bincount(group_NL.ravel(), weights=depth_NL.ravel())
        size = np.maximum(np.bincount(group_NL.ravel()), 1)
        return float(np.var((sums / size)[group_NL.ravel()]) / np.var(depth_NL))

    return {
        "loss": float(seen["loss_NL"].mean()),
        "mean_depth": float(depth_NL.mean()),
        "depth_histogram": (np.bincount(depth_NL.ravel()) / depth_NL.size).round(4).tolist(),
        "share_of_sigmoid_above_half": (sigmoid_ANL > 0.5).mean(axis=(1, 2)).round(4).tolist(),
        "correlation_with_entropy": correlation(seen["entropy_NL"]),
        "correlation_with_loss": correlation(seen["loss_NL"]),
        "correlation_with_position": correlation(position_NL),
        "variance_explained_by_token": explained(seen["tokens_NL"]),
        "variance_explained_by_position": explained(np.asarray(position_NL)),
        "most_processed": shown(ordered[::-1][:12]),
        "least_processed": shown(ordered[:12]),
    }


def draw(seen: dict[str, np.ndarray], path: Path) -> None:
    depth_NL = seen["selected_ANL"].sum(0)
    blocks = seen["selected_ANL"].shape[0]
    sigmoid_A = 1 / (1 + np.exp(-seen["scores_ANL"]))
    with plt.rc_context(RC):
        figure, axes = plt.subplots(2, 2, figsize=(16 / 2.54, 10 / 2.54))
        routing_map, histogram, by_entropy, by_position = axes.ravel()
        routing_map.imshow(seen["selected_ANL"][:, 0], aspect="auto", cmap="Blues",
                           interpolation="nearest", origin="lower")  # fmt: skip
        routing_map.set(xlabel="position", ylabel="routed block", yticks=range(blocks),
                        title="one validation sequence: what each block took")  # fmt: skip
        for a in range(blocks):
            histogram.hist(sigmoid_A[a].ravel(), bins=60, histtype="step", density=True,
                           color=COLOURS[a], label=f"block {a}")  # fmt: skip
        histogram.axvline(0.5, color="#d4d4d4", linewidth=0.6, zorder=0)
        histogram.set(xlabel="sigmoid(r)", ylabel="density", yscale="log")
        histogram.legend()
        order = np.argsort(seen["entropy_NL"], axis=None)
        for values, label, colour in (("entropy_NL", "entropy", COLOURS[0]),
                                      ("loss_NL", "loss", COLOURS[1])):  # fmt: skip
            order = np.argsort(seen[values], axis=None)
            parts = np.array_split(order, 20)
            x = [seen[values].ravel()[part].mean() for part in parts]
            y = [depth_NL.ravel()[part].mean() for part in parts]
            by_entropy.plot(x, y, "o-", color=colour, label=label, markersize=2.5)
        by_entropy.set(xlabel="of the prediction made at the token, nats",
                       ylabel="routed blocks used")  # fmt: skip
        by_entropy.legend()
        for a in range(blocks):
            by_position.plot(seen["selected_ANL"][a].mean(0), color=COLOURS[a], linewidth=0.7)
        by_position.set(xlabel="position", ylabel="share of sequences selected")
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def page(seen: dict[str, np.ndarray], codec: Any, title: str) -> str:
    """Text coloured by depth, self-contained."""
    depth_NL = seen["selected_ANL"].sum(0)
    blocks = seen["selected_ANL"].shape[0]
    bodies = []
    for n in range(SHOWN):
        spans = []
        pieces = codec.pieces([int(t) for t in seen["tokens_NL"][n]])
        for piece, depth in zip(pieces, depth_NL[n], strict=True):
            shade = f"rgba(213,94,0,{depth / blocks:.2f})"
            text = html.escape(piece.decode(errors="replace"))
            spans.append(
                f'<span style="background:{shade}" title="{depth} of {blocks}">{text}</span>'
            )
        bodies.append(f"<pre>{''.join(spans)}</pre>")
    legend = "".join(
        f'<span style="background:rgba(213,94,0,{d / blocks:.2f})">&nbsp;{d}&nbsp;</span>'
        for d in range(blocks + 1)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:14px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "pre{white-space:pre-wrap;border:1px solid #ddd;padding:1rem}</style>"
        f"<h1>{html.escape(title)}</h1><p>Routed blocks that each byte used: {legend}</p>"
        f"{''.join(bodies)}</html>\n"
    )


def main(workdir: Path, data_dir: Path, name: str) -> None:
    (spec,) = choose(workdir, None, routed=True)
    run = open_run(spec, workdir=workdir, data_dir=data_dir)
    codec = open_codec(run)
    seen = {routing: look(run, routing) for routing in ROUTINGS}
    found = {routing: summary(seen[routing], codec) for routing in ROUTINGS}
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(seen["predictor"], HERE / f"{name}.png")
    (HERE / f"{name}.html").write_text(
        page(seen["predictor"], codec, f"Depth used, byte by byte: {name}, predictor routing")
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
