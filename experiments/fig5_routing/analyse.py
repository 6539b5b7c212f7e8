"""Figure 5: where a trained model spends its depth.

Usage: python -m experiments.fig5_routing.analyse WORKDIR DATA_DIR NAME
WORKDIR holds a finished run of configs/fig5_routing.py on data prepared in DATA_DIR. Writes
NAME.png, NAME.html and NAME.json beside this file.

Legend: B batch, L positions, A routed blocks, V vocabulary, N sequences.
"""

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
from matplotlib.axes import Axes

from experiments import coloured_text
from modjax.finished.runs import Finished, choose, open_run
from modjax.finished.text import open_codec
from modjax.scaling.report.markers import COLOURS, RC
from modjax.training.results.evaluate import validation_batches

HERE = Path(__file__).parent
SHOWN = 4  # sequences on the page
LEAST = 50  # occurrences that a token needs to be counted
ROUTINGS = ("trained", "predictor")


def look(run: Finished, routing: str) -> dict[str, np.ndarray]:
    """Returns the routing and the predictions on the validation windows, under one routing.

    selected_ANL: whether each routed block selects each position.
    scores_ANL: raw router scores.
    loss_NL: loss of the prediction at each position, in nats.
    entropy_NL: entropy of that prediction, in nats.
    tokens_NL: input tokens.
    """

    @jax.jit
    def forward(weights, inputs_BL, targets_BL):
        logits_BLV, records = nnx.merge(run.model.graphdef, weights)(inputs_BL, routing=routing)
        log_p_BLV = jax.nn.log_softmax(logits_BLV)
        loss_BL = -jnp.take_along_axis(log_p_BLV, targets_BL[..., None], axis=2)[..., 0]
        entropy_BL = -jnp.sum(jnp.exp(log_p_BLV) * log_p_BLV, axis=2)
        routed = records["1_mod"]
        return routed.selected_BL, routed.scores_BL, loss_BL, entropy_BL

    batches = list(validation_batches(run.cache, run.spec.train, run.mesh))
    found = [(*forward(run.weights, b.inputs_BL, b.targets_BL), b.inputs_BL) for b in batches]
    selected, scores, loss, entropy, tokens = zip(*found, strict=True)
    return {
        "selected_ANL": np.concatenate(selected, axis=1),
        "scores_ANL": np.concatenate(scores, axis=1),
        "loss_NL": np.concatenate(loss),
        "entropy_NL": np.concatenate(entropy),
        "tokens_NL": np.concatenate(tokens),
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def summary(seen: dict[str, np.ndarray], codec: Any) -> dict[str, Any]:
    depth_NL = seen["selected_ANL"].sum(0)
    position_NL = np.broadcast_to(np.arange(depth_NL.shape[1]), depth_NL.shape)
    counts = np.bincount(seen["tokens_NL"].ravel())
    mean_depth = {
        token: float(depth_NL[seen["tokens_NL"] == token].mean())
        for token in np.flatnonzero(counts >= LEAST)
    }
    ordered = sorted(mean_depth, key=mean_depth.__getitem__)

    def correlation(other_NL):
        return float(np.corrcoef(depth_NL.ravel(), other_NL.ravel())[0, 1])

    def explained(group_NL):
        """Returns the share of the variance of depth that lies between groups."""
        sums = np.bincount(group_NL.ravel(), weights=depth_NL.ravel())
        size = np.maximum(np.bincount(group_NL.ravel()), 1)
        return float(np.var((sums / size)[group_NL.ravel()]) / np.var(depth_NL))

    def shown(tokens):
        names = coloured_text.texts(codec, tokens)
        rows = zip(tokens, names, strict=True)
        return [[name, round(mean_depth[t], 3), int(counts[t])] for t, name in rows]

    above_half_A = (sigmoid(seen["scores_ANL"]) > 0.5).mean(axis=(1, 2))
    return {
        "loss": float(seen["loss_NL"].mean()),
        "mean_depth": float(depth_NL.mean()),
        "depth_histogram": (np.bincount(depth_NL.ravel()) / depth_NL.size).round(4).tolist(),
        "share_of_sigmoid_above_half": above_half_A.round(4).tolist(),
        "correlation_with_entropy": correlation(seen["entropy_NL"]),
        "correlation_with_loss": correlation(seen["loss_NL"]),
        "correlation_with_position": correlation(position_NL),
        "variance_explained_by_token": explained(seen["tokens_NL"]),
        "variance_explained_by_position": explained(position_NL),
        "most_processed": shown(ordered[::-1][:12]),
        "least_processed": shown(ordered[:12]),
    }


def draw(seen: dict[str, np.ndarray], path: Path) -> None:
    blocks = range(len(seen["selected_ANL"]))
    with plt.rc_context(RC):
        figure, axes = plt.subplots(2, 2, figsize=(16 / 2.54, 10 / 2.54))
        routing_map, histogram, by_entropy, by_position = axes.ravel()
        first_AL = seen["selected_ANL"][:, 0]
        routing_map.imshow(
            first_AL, aspect="auto", cmap="Blues", interpolation="nearest", origin="lower"
        )
        routing_map.set(xlabel="position", ylabel="routed block", yticks=blocks)
        routing_map.set_title("one validation sequence: what each block took")
        draw_scores(histogram, seen)
        draw_depth(by_entropy, seen)
        for a in blocks:
            by_position.plot(seen["selected_ANL"][a].mean(0), color=COLOURS[a], linewidth=0.7)
        by_position.set(xlabel="position", ylabel="share of sequences selected")
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def draw_scores(ax: Axes, seen: dict[str, np.ndarray]) -> None:
    for a, scores_NL in enumerate(seen["scores_ANL"]):
        style = {"histtype": "step", "color": COLOURS[a], "label": f"block {a}"}
        ax.hist(sigmoid(scores_NL).ravel(), bins=60, density=True, **style)
    ax.axvline(0.5, color="#d4d4d4", linewidth=0.6, zorder=0)
    ax.set(xlabel="sigmoid(r)", ylabel="density", yscale="log")
    ax.legend()


def draw_depth(ax: Axes, seen: dict[str, np.ndarray]) -> None:
    """Draws mean depth against entropy and against loss, in 20 bins of equal size."""
    depth = seen["selected_ANL"].sum(0).ravel()
    for (name, label), colour in zip(
        (("entropy_NL", "entropy"), ("loss_NL", "loss")), COLOURS, strict=False
    ):
        values = seen[name].ravel()
        bins = np.array_split(np.argsort(values), 20)
        x, y = [values[i].mean() for i in bins], [depth[i].mean() for i in bins]
        ax.plot(x, y, "o-", color=colour, label=label, markersize=2.5)
    ax.set(xlabel="of the prediction made at the token, nats", ylabel="routed blocks used")
    ax.legend()


def page(seen: dict[str, np.ndarray], codec: Any, title: str) -> str:
    """Returns text coloured by depth."""
    depth_NL = seen["selected_ANL"].sum(0)
    blocks = len(seen["selected_ANL"])

    def colour(depth: int) -> str:
        return f"rgba(213,94,0,{depth / blocks:.2f})"

    sequences = [
        [
            (text, colour(depth), f"{depth} of {blocks}")
            for text, depth in zip(coloured_text.texts(codec, tokens_L), depth_L, strict=True)
        ]
        for tokens_L, depth_L in zip(seen["tokens_NL"][:SHOWN], depth_NL[:SHOWN], strict=True)
    ]
    legend = [(f"{depth}", colour(depth)) for depth in range(blocks + 1)]
    return coloured_text.page(title, "Routed blocks that each byte used: ", legend, sequences)


def main(workdir: Path, data_dir: Path, name: str) -> None:
    (spec,) = choose(workdir, None, routed=True).specs
    run = open_run(spec, workdir=workdir, data_dir=data_dir)
    codec = open_codec(run)
    seen = {routing: look(run, routing) for routing in ROUTINGS}
    found = {routing: summary(seen[routing], codec) for routing in ROUTINGS}
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(seen["predictor"], HERE / f"{name}.png")
    title = f"Depth used, byte by byte: {name}, predictor routing"
    (HERE / f"{name}.html").write_text(page(seen["predictor"], codec, title))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
