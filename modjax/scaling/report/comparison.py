"""Prose on the loss by which arms are compared, and on runs that have no causal loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from modjax.records import RunRecord, causal_loss
from modjax.scaling.fit.results import Fits, NoCausalLoss

LOSSES = {"trained": "validation loss as trained", "causal": "causal validation loss"}


def marked(fits: Fits) -> Fits:
    """Returns the fits with a * behind arms that are ranked although they have no causal loss."""
    names = {arm: mark(fits, arm) for arm in fits.arms}

    def each(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(item, arm=names.get(item.arm, item.arm)) for item in items)

    gaps = tuple(dataclasses.replace(gap, baseline=names[gap.baseline]) for gap in each(fits.gaps))
    return dataclasses.replace(
        fits,
        arms=tuple(names.values()),
        baseline=names[fits.baseline],
        gaps=gaps,
        **{
            field: each(getattr(fits, field))
            for field in ("parabolas", "laws", "surfaces", "repeats", "no_causal_loss")
        },
    )


def mark(fits: Fits, arm: str) -> str:
    """Returns the arm's name, with a * where the fits rank it without a causal loss."""
    without = fits.loss == "trained" and any(found.arm == arm for found in fits.no_causal_loss)
    return f"{arm}*" if without else arm


def loss_words(r: RunRecord) -> str:
    """Returns the loss of a finished run; both where the causal one is not that as trained."""
    assert r.eval_loss is not None
    causal = causal_loss(r)
    if causal == r.eval_loss:
        return f"loss {causal:.4f}"
    said = "no causal loss" if causal is None else f"causal loss {causal:.4f}"
    return f"{said}, as trained {r.eval_loss:.4f}"


def no_causal_sentence(found: NoCausalLoss, loss: str) -> str:
    """Names runs of `marked` fits that have no causal loss, and says why and what follows."""
    if loss == "trained":
        how = "its" if found.runs == found.finished else f"{found.runs} of its"
        return (
            f"* marks {found.arm}: {how} runs have no causal loss "
            f"({found.why}), so that no sampling reaches their loss as trained."
        )
    who = f"{found.arm} is"
    if found.runs < found.finished:
        verb = "is" if found.runs == 1 else "are"
        who = f"{found.runs} of {found.arm}'s {found.finished} runs {verb}"
    return (
        f"{who} not compared: no causal loss ({found.why}). --loss=trained compares all runs as "
        "they were trained."
    )


def loss_sentence(fits: Fits) -> str:
    """Says by which loss arms are compared."""
    if fits.loss == "trained":
        return (
            "Losses are those of the runs as they were trained, also where training looks ahead "
            "or drops what experts have no slot for."
        )
    routings = [
        f"{', '.join(arms)} {'as trained' if routing == 'trained' else f'by {routing}'}"
        for routing, arms in fits.routings.items()
    ]
    return f"Losses are under routing that never looks ahead ({'; '.join(routings)})."
