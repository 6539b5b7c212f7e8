"""Scores of text and tasks against a plain loop: one sequence at a time, without padding.

Legend: B sequences, L positions.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.data.codecs.codec import Bytes
from modjax.errors import InputError
from modjax.finished import score as module
from modjax.finished.score import score, task_unit, text_units
from modjax.finished.tasks import Request
from modjax.finished.text import Speaker
from modjax.nn import Transformer
from modjax.specs import Dense, MoD, Predictor
from tests.nn.small import QUICK
from tests.training.tiny import run_spec

CODEC = Bytes()
SEQ_LEN = 16
TEXTS = {  # their last windows have 16, 2, 9, 9 and 9 tokens
    "first": ["The cat sat on the mat, and so did a hat", "ab", "x", "Some more words: 123, 45!"],
    "second": ["Another file with just one document in it, and it is the end of it. It's."],
}


@pytest.fixture(scope="module")
def speaker():
    """A random model with a routed block, which prefers to write capital letters."""
    layers = (Dense(), MoD(capacity=0.25, causal=Predictor()))
    spec = run_spec(layers=layers).model
    graphdef, weights = nnx.split(Transformer(spec, rngs=nnx.Rngs(0)))
    weights = nnx.to_pure_dict(weights)
    letters = jnp.zeros((1, 260)).at[:, 65 + CODEC.FIRST : 91 + CODEC.FIRST].set(5.0)
    weights["unembed"]["w_logits"] *= letters
    return Speaker(spec, graphdef, weights, CODEC, CODEC.encode, eos_ids=(1,), vocab_size=259)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several batches of few positions, compiled quickly."""
    monkeypatch.setattr(module, "POSITIONS", 64)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def plain(speaker):
    """Returns a function from tokens and a routing to log p of each, and the selected positions."""

    @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
    def forward(tokens_BL, routing):
        return nnx.merge(speaker.graphdef, speaker.weights)(tokens_BL, routing=routing)

    @functools.cache
    def of(ids, routing):
        logits_BLV, records = forward(jnp.array([ids[:-1]]), routing)
        x_LV = np.float64(logits_BLV[0])
        x_LV -= np.log(np.exp(x_LV - x_LV.max()).sum(axis=1, keepdims=True)) + x_LV.max()
        log_p_L = x_LV[np.arange(len(ids) - 1), list(ids[1:])]
        return log_p_L, x_LV.argmax(axis=1), np.asarray(records["1_mod"].selected_BL)[0, 0]

    return lambda ids, routing: of(tuple(ids), routing)


def windows(text):
    ids = CODEC.encode(text, "")
    return [ids[at : at + SEQ_LEN + 1] for at in range(0, len(ids), SEQ_LEN) if at + 1 < len(ids)]


def scored_texts(speaker, routing, texts=TEXTS):
    files = {name: text_units(speaker, Path(name), all_, SEQ_LEN) for name, all_ in texts.items()}
    return score(speaker, files, routing, SEQ_LEN)


def test_the_loss_of_text_is_that_of_its_windows(speaker, plain):
    found = {one.name: one for one in scored_texts(speaker, "predictor")}
    sums = {
        name: [plain(ids, "predictor")[0] for text in texts for ids in windows(text)]
        for name, texts in TEXTS.items()
    }
    assert set(found) == {"first", "second", "pooled"}
    for name, nats in {**sums, "pooled": sums["first"] + sums["second"]}.items():
        each, value = np.concatenate(nats), found[name].measures["nats"]["score"]
        assert found[name].count == len(each)
        assert value.value == pytest.approx(-each.mean(), rel=1e-5)
        assert value.low < value.value < value.high
    assert found["first"].count == sum(len(text) - 1 for text in TEXTS["first"])
    assert set(found["first"].measures["nats"]) == {"score"}, "the model has no base"


def test_the_bootstrap_draws_blocks_of_consecutive_windows(speaker):
    units = text_units(speaker, Path("x"), ["ab" * 200], 8)
    assert [len(unit.rows) for unit in units] == [4] * 12 + [2], "the cube root of 50 is 3.7"
    assert [first for unit in units for _, first in unit.rows] == [1] * 50
    assert sum(unit.weight for unit in units) == 399


def test_each_window_begins_as_the_tokenizer_begins_a_text(speaker, plain):
    begins = speaker._replace(encode=lambda text, field: [2, *CODEC.encode(text, field)])
    (found,) = scored_texts(begins, "predictor", {"x": TEXTS["second"]})
    ids, room = CODEC.encode(TEXTS["second"][0], ""), SEQ_LEN - 1
    rows = [[2, *ids[at : at + room + 1]] for at in range(0, len(ids) - 1, room)]
    nats = np.concatenate([plain(row, "predictor")[0][1:] for row in rows])
    assert found.count == len(nats) == len(ids) - 1
    assert found.measures["nats"]["score"].value == pytest.approx(-nats.mean(), rel=1e-5)


def test_the_share_of_processed_positions_is_that_of_real_positions(speaker, plain):
    *_, pooled = scored_texts(speaker, "predictor")
    rows = [ids for texts in TEXTS.values() for text in texts for ids in windows(text)]
    selected = np.concatenate([plain(ids, "predictor")[2] for ids in rows])
    assert 0 < selected.mean() < 1 and set(pooled.layers) == {"all", "1_mod.0"}
    for layer in pooled.layers.values():
        assert layer["capacity"] == pytest.approx(selected.mean())


def test_a_base_is_the_same_model_under_the_routing_that_processes_all(speaker, monkeypatch):
    alone = [scored_texts(speaker, routing) for routing in ("predictor", "paced")]
    monkeypatch.setattr(module, "BASE", "paced")
    for ours, base, both in zip(*alone, scored_texts(speaker, "predictor"), strict=True):
        found = both.measures["nats"]
        assert set(found) == {"score", "base", "difference"}
        assert found["score"] == ours.measures["nats"]["score"]
        assert found["base"] == base.measures["nats"]["score"] != found["score"]
        gap = found["score"].value - found["base"].value
        assert found["difference"].value == pytest.approx(gap)
        assert both.layers == ours.layers
    assert str(scored_texts(speaker, "paced")) == str(alone[1]), "a base has no base"


def request(context, continuation, label, idx=0, doc_id=0):
    return Request("x:1", doc_id, idx, label, context, continuation)


# Sequences of 13, of 13 and of 19 tokens: the loop compiles a program for each length.
CHOICES = [
    [request("Question: ", text, 1, i) for i, text in enumerate(("ABC", "no.", "yes"))],
    [request("Longer\n", text, 0, i) for i, text in enumerate(("LEFTLY", "right,"))],
    [request("", "empty conte.", 0, 0), request("CONTEXT OF IT", "SOMENO", 0, 1)],
    [request("Question:  ", text, 1, i) for i, text in enumerate(("AB", "CDEFGHIJ"))],
]


def log_p(plain, one, routing):
    """Returns log p of a continuation, and whether each of its tokens is the likeliest."""
    first, second = (CODEC.encode(text, "") for text in (one.context.rstrip(), one.continuation))
    spaces = CODEC.encode(one.context[len(one.context.rstrip()) :], "")
    ids = (first or [1]) + spaces + second
    log_p_L, likeliest_L, _ = plain(ids, routing)
    scored = len(spaces + second)
    return log_p_L[-scored:].sum(), bool((likeliest_L[-scored:] == ids[-scored:]).all())


def test_choices_are_scored_as_by_a_plain_loop(speaker, plain, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    units = [task_unit(speaker, document) for document in CHOICES]
    (found,) = score(speaker, {"task": units}, "predictor", None)
    raw, per_byte, nats = [], [], []
    for document in CHOICES:
        each = [log_p(plain, one, "predictor")[0] for one in document]
        sizes = [len(one.continuation.encode()) for one in document]
        raw.append(int(np.argmax(each)) == document[0].label)
        per_byte.append(int(np.argmax(np.divide(each, sizes))) == document[0].label)
        nats.append(-each[document[0].label])
    assert raw != per_byte and sum(raw) != sum(per_byte), "likelier per byte only"
    assert found.count == 4 and list(found.measures) == ["accuracy", "per byte", "nats"]
    for name, values in {"accuracy": raw, "per byte": per_byte, "nats": nats}.items():
        assert found.measures[name]["score"].value == pytest.approx(np.mean(values), rel=1e-5)


def test_a_single_continuation_is_scored_and_compared_with_greedy_decoding(
    speaker, plain, monkeypatch
):
    monkeypatch.setattr(module, "SHORTEST", 16)
    ids = CODEC.encode("The LAST W", "")
    while len(ids) < 13:
        padded = ids + [0] * (13 - len(ids))
        ids.append(int(plain(padded, "predictor")[1][len(ids) - 1]))
    drawn = b"".join(CODEC.pieces(ids)).decode()
    documents = [
        [request(drawn[:10], drawn[10:], [drawn[10:]])],
        [request(drawn[:10], drawn[10:12] + "~", "~")],
        [request("The l", "ast word", "ast word")],
    ]
    units = [task_unit(speaker, document) for document in documents]
    (found,) = score(speaker, {"task": units}, "predictor", None)
    each = [log_p(plain, document[0], "predictor") for document in documents]
    assert [greedy for _, greedy in each] == [True, False, False]
    assert found.measures["greedy"]["score"].value == pytest.approx(1 / 3)
    nats = -np.mean([log_p for log_p, _ in each])
    assert found.measures["nats"]["score"].value == pytest.approx(nats, rel=1e-5)


def test_tasks_are_pooled_if_they_have_the_same_measures(speaker, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    one, two, *_ = (task_unit(speaker, document) for document in CHOICES)
    last = task_unit(speaker, [request("a word after", "b", "b")])
    found = score(speaker, {"one": [one], "two": [two]}, "predictor", None)
    assert [(score.name, score.count) for score in found] == [("one", 1), ("two", 1), ("pooled", 2)]
    values = [score.measures["nats"]["score"].value for score in found]
    assert values[2] == pytest.approx(np.mean(values[:2]))
    found = score(speaker, {"one": [one], "last": [last]}, "predictor", None)
    assert [score.name for score in found] == ["one", "last"]


def test_long_work_says_how_far_it_is(speaker, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1)
    scored_texts(speaker, "predictor", {"x": TEXTS["second"]})
    assert capsys.readouterr().err.splitlines() == [
        "modjax: x, routing predictor: 4 of 5 sequences",
        "modjax: x, routing predictor: 5 of 5 sequences",
    ]


def test_what_cannot_be_scored_is_refused_in_one_line(speaker):
    path, long = Path("x"), "a" * 65_537
    for call, reason in {
        lambda: text_units(speaker, path, ["a", ""], 8): "--text = 'x': holds no text of two",
        lambda: text_units(speaker, path, ["abc"], 0): "--seq-len = 0: must be 1 to 65536",
        lambda: text_units(speaker, path, ["abc"], 65_537): "--seq-len = 65537: must be 1 to",
        lambda: task_unit(speaker, [request("", long, 0)]): "'x:1': has 65537 tokens; must have",
        lambda: task_unit(speaker, [request("\ud800", "a", 0)]): "is not UTF-8 at character 0",
        lambda: score(speaker, {}, "trained", 8): "--routing = 'trained': looks at tokens",
        lambda: score(speaker, {}, "all", 8): "--routing = 'all': must be one of",
    }.items():
        with pytest.raises(InputError) as caught:
            call()
        assert reason in str(caught.value)
