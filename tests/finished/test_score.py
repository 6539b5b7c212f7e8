"""Scores of text and tasks against a plain loop: one sequence at a time, without padding.

Legend: B sequences, L positions.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.data import progress
from modjax.data.codecs.codec import Bytes
from modjax.errors import InputError
from modjax.finished import score as module
from modjax.finished.score import Unit, score, task_unit, text_units
from modjax.finished.tasks import Request
from modjax.finished.text import Speaker
from modjax.specs import MLP, Dense, Skip
from modjax.training.state import abstract_model, joined
from tests.nn.small import QUICK
from tests.training.tiny import initial_state, run_spec

CODEC = Bytes()
SEQ_LEN = 16
TEXTS = {  # all last windows have 9 tokens, but for a text of one token, which has no window
    "first": ["A cat sat on a mat, 23 45", "An end: x", "x", "Some words: 1, 2 and 3 45"],
    "second": ["Another file with just one document in it, and it is the end of it. It's."],
}


def drawn(*layers):
    """Returns a random model that prefers to write capital letters, and its weights."""
    spec = run_spec(layers=layers).model
    params, frozen, measured, *_ = initial_state(spec)
    weights = joined(params, frozen, measured)
    letters = jnp.zeros((1, 260)).at[:, 65 + CODEC.FIRST : 91 + CODEC.FIRST].set(5.0)
    weights["unembed"]["w_logits"] *= letters
    block = weights["stack"]["blocks"].get("1_skip", {"router": {"w": letters}})
    block["router"]["w"] = jax.random.normal(jax.random.key(4), block["router"]["w"].shape)
    return spec, abstract_model(spec).graphdef, weights


def speaker_of(spec, graphdef, weights):
    return Speaker(spec, graphdef, weights, CODEC, CODEC.encode, eos_ids=(1,), vocab_size=259)


@pytest.fixture(scope="module")
def speaker():
    return speaker_of(*drawn(Dense(), Skip(MLP())))


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several batches of few positions, compiled quickly."""
    monkeypatch.setattr(module, "POSITIONS", 64)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICK)
def forward(graphdef, weights, tokens_BL, routing):
    return nnx.merge(graphdef, weights)(tokens_BL, routing=routing)


def looped(graphdef, weights):
    """Returns a function from tokens and a routing to log p of each, the likeliest and records."""

    @functools.cache
    def of(ids, routing):
        logits_BLV, records = forward(graphdef, weights, jnp.array([ids[:-1]]), routing)
        x_LV = np.float64(logits_BLV[0])
        x_LV -= np.log(np.exp(x_LV - x_LV.max()).sum(axis=1, keepdims=True)) + x_LV.max()
        log_p_L = x_LV[np.arange(len(ids) - 1), list(ids[1:])]
        return log_p_L, x_LV.argmax(axis=1), records

    return lambda ids, routing: of(tuple(ids), routing)


@pytest.fixture(scope="module")
def plain(speaker):
    return looped(speaker.graphdef, speaker.weights)


def windows(text):
    ids = CODEC.encode(text, "")
    return [ids[at : at + SEQ_LEN + 1] for at in range(0, len(ids), SEQ_LEN) if at + 1 < len(ids)]


def scored_texts(speaker, routing, texts=TEXTS):
    files = {name: text_units(speaker, Path(name), all_, SEQ_LEN) for name, all_ in texts.items()}
    return score(speaker, files, routing, SEQ_LEN)


def test_the_loss_of_text_is_that_of_its_windows_and_its_base_skips_nothing(speaker, plain):
    found = {one.name: one for one in scored_texts(speaker, "causal")}
    assert set(found) == {"first", "second", "pooled"}
    assert found["first"].count == sum(len(text) - 1 for text in TEXTS["first"])
    for side, routing in (("score", "causal"), ("base", "all")):
        sums = {
            name: [plain(ids, routing)[0] for text in texts for ids in windows(text)]
            for name, texts in TEXTS.items()
        }
        for name, nats in {**sums, "pooled": sums["first"] + sums["second"]}.items():
            each, values = np.concatenate(nats), found[name].measures["nats"]
            assert found[name].count == len(each)
            assert values[side].value == pytest.approx(-each.mean(), rel=1e-5)
            assert values[side].low < values[side].value < values[side].high
    gap = values["score"].value - values["base"].value
    assert values["difference"].value == pytest.approx(gap, rel=1e-4) and abs(gap) > 3e-4
    assert "mcnemar" not in values


def test_models_of_one_base_score_it_once(speaker, monkeypatch):
    files, bases = {"x": text_units(speaker, Path("x"), TEXTS["second"], SEQ_LEN)}, {}
    (first,) = score(speaker, files, "causal", SEQ_LEN, bases)
    other = jax.tree_util.tree_map_with_path(
        lambda path, w: w + 1.0 if path[-1].key == "threshold" else w, speaker.weights
    )
    scored, routings = module._scored, []
    monkeypatch.setattr(module, "_scored", lambda *a: routings.append(a[3]) or scored(*a))
    (second,) = score(speaker._replace(weights=other), files, "causal", SEQ_LEN, bases)
    assert routings == ["causal"]
    ours, theirs = (one.measures["nats"] for one in (first, second))
    assert ours["base"] == theirs["base"] and ours["score"] != theirs["score"]


def test_the_bootstrap_draws_blocks_of_consecutive_windows(speaker):
    units = text_units(speaker, Path("x"), ["ab" * 200], 8)
    assert [len(unit.rows) for unit in units] == [4] * 12 + [2], "the cube root of 50 is 3.7"
    assert [first for unit in units for _, first in unit.rows] == [1] * 50
    assert sum(unit.weight for unit in units) == 399


def test_each_window_begins_as_the_tokenizer_begins_a_text(speaker, plain):
    begins = speaker._replace(encode=lambda text, field: [2, *CODEC.encode(text, field)])
    (found,) = scored_texts(begins, "causal", {"x": TEXTS["second"]})
    ids, room = CODEC.encode(TEXTS["second"][0], ""), SEQ_LEN - 1
    rows = [[2, *ids[at : at + room + 1]] for at in range(0, len(ids) - 1, room)]
    nats = np.concatenate([plain(row, "causal")[0][1:] for row in rows])
    assert found.count == len(nats) == len(ids) - 1
    assert found.measures["nats"]["score"].value == pytest.approx(-nats.mean(), rel=1e-5)


def test_the_share_of_processed_positions_is_that_of_real_positions(speaker, plain):
    *_, pooled = scored_texts(speaker, "causal")
    rows = [ids for texts in TEXTS.values() for text in texts for ids in windows(text)]
    records = [plain(ids, "causal")[2]["1_skip"] for ids in rows]
    selected = np.concatenate([record.selected_BL[0, 0] for record in records])
    assert 0 < selected.mean() < 1 and set(pooled.layers) == {"all", "1_skip.0"}
    for layer in pooled.layers.values():
        assert layer["skip_capacity"] == pytest.approx(selected.mean())


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
    (found,) = score(speaker, {"task": units}, "all", None)
    raw, per_byte, nats = [], [], []
    for document in CHOICES:
        each = [log_p(plain, one, "all")[0] for one in document]
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
        ids.append(int(plain(padded, "causal")[1][len(ids) - 1]))
    drawn = b"".join(CODEC.pieces(ids)).decode()
    documents = [
        [request(drawn[:10], drawn[10:], [drawn[10:]])],
        [request(drawn[:10], drawn[10:12] + "~", "~")],
        [request("The l", "ast word", "ast word")],
    ]
    units = [task_unit(speaker, document) for document in documents]
    (found,) = score(speaker, {"task": units}, "causal", None)
    each = [log_p(plain, document[0], "causal") for document in documents]
    assert [greedy for _, greedy in each] == [True, False, False]
    assert found.measures["greedy"]["score"].value == pytest.approx(1 / 3)
    nats = -np.mean([log_p for log_p, _ in each])
    assert found.measures["nats"]["score"].value == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation", "begin", "row"),
    [
        ("a", "cd", [], ([10, 12, 13], 1)),
        ("a ", "cd", [], ([10, 9, 12, 13], 1)),  # the space is scored
        ("a", "b", [], ([1, 20], 1)),  # one token spans both: it is scored after the end of a text
        ("ca", "bd", [], ([12, 20, 13], 1)),
        ("", "cd", [], ([1, 12, 13], 1)),
        ("", "cd", [2], ([2, 12, 13], 1)),
        ("a", "cd", [2, 3], ([2, 10, 12, 13], 2)),  # a tokenizer that ends texts by a 3
    ],
)
def test_context_and_continuation_are_tokenised_together(context, continuation, begin, row):
    ids = {"ab": 20, "a": 10, "b": 11, "c": 12, "d": 13, " ": 9}
    codec: Any = SimpleNamespace(
        encode=lambda text, _: [ids[part] for part in re.findall("ab|.", text)]
    )
    one = speaker_of(None, None, None)._replace(codec=codec, encode=lambda text, _: begin)
    unit = task_unit(one, [request(context, continuation, "")])
    assert unit == Unit([row], 1, None, (len(continuation),))


def test_a_sequence_is_skipped_by_its_context_and_its_base_never(monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    spec, graphdef, weights = drawn(Dense(), Skip(MLP(), unit="sequence"))
    decided = looped(graphdef, weights)
    _, dense, base = drawn(Dense(), MLP())
    blocks = weights["stack"]["blocks"]
    first, inner = blocks["0_seq"], blocks["1_skip"]["inner"]
    base |= {**weights, "stack": {"blocks": {"0_seq": first, "1_mlp": inner}}}
    nothing = jax.tree.map(jnp.zeros_like, inner)
    without = {**base, "stack": {"blocks": {"0_seq": first, "1_mlp": nothing}}}
    ran, skipped = looped(dense, base), looped(dense, without)
    contexts = ("The cat: ", "A dog is ", "QUESTION ", "12+30 =? ")
    documents = [
        [request(one, text, 0, i) for i, text in enumerate(("ABCD", "efg."))] for one in contexts
    ]
    units = [task_unit(speaker_of(spec, graphdef, weights), document) for document in documents]
    (found,) = score(speaker_of(spec, graphdef, weights), {"x": units}, "causal", None)
    runs, ours, theirs = [], [], []
    for context, ((continued, *_), *_) in zip(contexts, units, strict=True):
        ids = CODEC.encode(context.rstrip() + ".", "")
        runs.append(bool(decided(ids, "trained")[2]["1_skip"].wanted_BL[0, 0, 0]))
        tokens, first = continued
        ours.append(-(ran if runs[-1] else skipped)(tokens, "trained")[0][first - 1 :].sum())
        theirs.append(-ran(tokens, "trained")[0][first - 1 :].sum())
    assert 0 < np.mean(runs) < 1
    nats = found.measures["nats"]
    assert nats["score"].value == pytest.approx(np.mean(ours), rel=1e-5)
    assert nats["base"].value == pytest.approx(np.mean(theirs), rel=1e-5)
    assert nats["difference"].value == pytest.approx(np.mean(ours) - np.mean(theirs), rel=1e-4)
    assert "mcnemar" in found.measures["accuracy"] and "mcnemar" not in nats
    assert found.layers["1_skip.0"]["skip_capacity"] == pytest.approx(np.mean(runs))


def test_tasks_are_pooled_if_they_have_the_same_measures(speaker, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    one, two, *_ = (task_unit(speaker, document) for document in CHOICES)
    last = task_unit(speaker, [request("a word after", "b", "b")])
    found = score(speaker, {"one": [one], "two": [two]}, "causal", None)
    assert [(score.name, score.count) for score in found] == [("one", 1), ("two", 1), ("pooled", 2)]
    values = [score.measures["nats"]["score"].value for score in found]
    assert values[2] == pytest.approx(np.mean(values[:2]))
    found = score(speaker, {"one": [one], "last": [last]}, "causal", None)
    assert [score.name for score in found] == ["one", "last"]


def test_long_work_says_how_far_it_is(speaker, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    scored_texts(speaker, "causal", {"x": TEXTS["second"]})
    assert capsys.readouterr().err.splitlines() == [
        f"modjax: x, routing {routing}: {done} of 5 sequences"
        for routing in ("causal", "all")
        for done in (4, 5)
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
        lambda: score(speaker, {}, "paced", 8): "--routing = 'paced': must be one of",
    }.items():
        with pytest.raises(InputError) as caught:
            call()
        assert reason in str(caught.value)
