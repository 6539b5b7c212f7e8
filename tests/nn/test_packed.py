"""Documents that share a row are read as if each were alone, under every causal routing.

Legend: B batch, L positions.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from modjax.nn import Routed
from modjax.specs import (
    AltUp,
    Attention,
    Causal,
    Dense,
    MoD,
    ModelSpec,
    MoE,
    Positional,
    Predictor,
    Random,
    Recycled,
    Seq,
    SequenceAltUp,
    Sinusoids,
    StridePool,
    StrideSkip,
    TopK,
    Window,
)
from tests.nn.small import KINDS, QUICK, random_model, taught

# Two documents, and padding after them. The second begins where a period of two begins.
TAUGHT = TopK(auxiliary=1.0)
FIRST, SECOND, LENGTH = slice(0, 6), slice(6, 11), 13
SEGMENTS_L = np.repeat([1, 2, 0], [6, 5, 2])


def config_of(*layers):
    return ModelSpec(20, 8, len(layers), 2, 1, 16, layers=layers)


def by_content(routing):
    """Returns every scheme but those that read the position in the row, which packing changes.

    Positional() stays by an even number of positions, so that every second one stays so.
    """
    for layer in taught(routing, capacity=0.7):
        if isinstance(layer, MoD) and layer.rule == Positional():
            yield dataclasses.replace(layer, capacity=0.5)
        elif not isinstance(layer, MoD) or not (
            layer.router == Sinusoids()
            or (layer.rule == Random() and routing in ("causal", "threshold"))
        ):
            yield layer


def reader(config, routing, **options):
    """Returns a function (tokens_BL, segment_ids_BL) -> (logits_BLV, masks of routed layers)."""
    graphdef, params = random_model(config, std=0.5, seed=8)

    def read(params, tokens_BL, segment_ids_BL):
        logits_BLV, records = nnx.merge(graphdef, params)(
            tokens_BL, segment_ids_BL, routing=routing, key=jax.random.key(0), **options
        )
        return logits_BLV, [
            {mask: getattr(record, mask)[0] for mask in ("requested_BL", "selected_BL")}
            for record in records.values()
            if isinstance(record, Routed)
        ]

    compiled = jax.jit(read, compiler_options=QUICK)
    return lambda tokens_BL, segment_ids_BL: jax.device_get(
        compiled(params, tokens_BL, segment_ids_BL)
    )


# Documents of a paced row share its budget, as in training.
@pytest.mark.parametrize("routing", sorted(KINDS.keys() - {"paced"}))
def test_packed_documents_are_routed_and_read_as_if_alone(routing):
    read = reader(config_of(*by_content(routing)), routing)
    packed_L, noise_L, edit_L = np.random.default_rng(0).integers(0, 20, (3, LENGTH))
    edited_L = np.concatenate([edit_L[FIRST], packed_L[SECOND], edit_L[-2:]])
    # What follows a document that begins its row cannot reach it.
    alone = [np.concatenate([packed_L[part], noise_L])[:LENGTH] for part in (FIRST, SECOND)]
    tokens_BL = np.stack([packed_L, edited_L, *alone])
    whole_L = np.ones(LENGTH, int)
    logits_BLV, layers = read(tokens_BL, np.stack([SEGMENTS_L, SEGMENTS_L, whole_L, whole_L]))

    assert 0.1 < np.std(logits_BLV) < 10
    for row, part in ((2, FIRST), (3, SECOND)):
        start = slice(0, part.stop - part.start)
        np.testing.assert_allclose(
            logits_BLV[0, part], logits_BLV[row, start], rtol=1e-5, atol=1e-5
        )
        for layer in layers:
            np.testing.assert_array_equal(
                layer["selected_BL"][0, part], layer["selected_BL"][row, start]
            )
    np.testing.assert_allclose(logits_BLV[1, SECOND], logits_BLV[0, SECOND], rtol=1e-5, atol=1e-5)
    for layer in layers:
        np.testing.assert_array_equal(
            layer["selected_BL"][1, SECOND], layer["selected_BL"][0, SECOND]
        )
        assert not np.any(layer["requested_BL"][:2, SEGMENTS_L == 0])
    # Both documents go both ways.
    for part in (FIRST, SECOND):
        share = np.mean([layer["selected_BL"][0, part] for layer in layers])
        assert 0.1 < share < 0.9
    differ = [np.any(layer["selected_BL"][0] != layer["selected_BL"][1]) for layer in layers]
    assert any(differ)


MOD = {"capacity": 0.4, "rule": TAUGHT, "causal": Predictor()}
DOCUMENTS_L = np.repeat([1, 2, 3, 0], [7, 10, 6, 1])
STRIDES = (
    SequenceAltUp(Dense(), stride=2),
    StrideSkip(Dense(), stride=3),
    StridePool(SequenceAltUp(Dense(), stride=2), stride=2),
    SequenceAltUp(
        Seq(Attention(mask=Causal() & Window(4)), MoE(2, capacity_factor=None)), stride=2
    ),
)
SELECTIONS = {
    "strides": {"layers": STRIDES},
    "MoD around strides": {"layers": tuple(MoD(layer, **MOD) for layer in STRIDES)},
    "strides around MoD": {
        "layers": (
            SequenceAltUp(MoD(StridePool(Dense(), stride=2), **MOD), stride=2),
            StrideSkip(MoD(MoD(StrideSkip(Dense(), stride=2), **MOD), **MOD), stride=2),
        )
    },
    "streams": {
        "layers": (
            AltUp(MoD(SequenceAltUp(Dense(), stride=2), **MOD)),
            MoD(Seq(SequenceAltUp(AltUp(Dense()), stride=2), AltUp(active=1)), **MOD),
        ),
        "streams": Recycled(2),
    },
}
BY = [
    ("strides", "trained"),
    *((name, "threshold") for name in SELECTIONS if name != "strides"),
    ("MoD around strides", "auxiliary"),
    ("streams", "auxiliary"),
]


@pytest.mark.parametrize("name, routing", BY)
def test_editing_a_document_moves_no_logit_of_those_after_it(name, routing):
    layers = SELECTIONS[name]["layers"]
    config = ModelSpec(20, 8, len(layers), 2, 1, 16, **SELECTIONS[name])
    graphdef, params = random_model(config, std=0.5, seed=8)
    tokens_BL = np.random.default_rng(0).integers(0, 20, (12, len(DOCUMENTS_L)))
    tokens_BL[:, DOCUMENTS_L != 1] = tokens_BL[0, DOCUMENTS_L != 1]  # only the first is edited
    segment_ids_BL = np.tile(DOCUMENTS_L, (12, 1))

    def read(params):
        model = nnx.merge(graphdef, params)
        return model(tokens_BL, segment_ids_BL, routing=routing, key=jax.random.key(0))

    logits_BLV, records = jax.jit(read, compiler_options=QUICK)(params)
    for document in (1, 2, 3):
        mine_BLV = np.asarray(logits_BLV)[:, document == DOCUMENTS_L]
        moved = np.max(np.abs(mine_BLV - mine_BLV[:1]))
        assert moved < 1e-5 if document > 1 else moved > 0.1
    routed = [record for record in records.values() if isinstance(record, Routed)]
    for record in routed:  # so that what is selected of the first is no multiple of any stride
        counts_B = np.sum(np.asarray(record.selected_BL)[0][:, DOCUMENTS_L == 1], axis=1)
        assert len(set(counts_B)) > 2
    assert routed or routing == "trained" or name == "strides around MoD"


def test_documents_of_a_row_share_its_slots_and_the_first_takes_them_first():
    config = config_of(
        Dense(), Dense(), MoD(Dense(), capacity=0.3, rule=TAUGHT, causal=Predictor())
    )
    length = SECOND.stop - SECOND.start
    tokens_1L = np.random.default_rng(4).integers(0, 20, (1, LENGTH))
    logits_1LV, (layer,) = reader(config, "predictor", slack=1.0)(tokens_1L, SEGMENTS_L[None])
    wanted_L, selected_L = layer["requested_BL"][0], layer["selected_BL"][0]
    slots = 4  # ceil(1.0 * 0.3 * 13)
    np.testing.assert_array_equal(selected_L, wanted_L & (np.cumsum(wanted_L) <= slots))
    left = slots - np.sum(selected_L[FIRST])
    assert 0 < left < np.sum(wanted_L[SECOND])

    # Alone, in a row of 5 whose slots are those that were left.
    slack = (left - 0.5) / (0.3 * length)
    alone_1LV, (layer,) = reader(config, "predictor", slack=slack)(tokens_1L[:, SECOND], None)
    np.testing.assert_array_equal(selected_L[SECOND], layer["selected_BL"][0])
    np.testing.assert_allclose(logits_1LV[:, SECOND], alone_1LV, rtol=1e-5, atol=1e-5)
