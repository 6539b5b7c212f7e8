"""Text from a model: stops, streams and vocabularies. The model is a table.

Legend: B batch, L positions, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.data.codecs.codec import Bytes, Pieces
from modjax.data.vocabulary import train_sentencepiece
from modjax.decoding.generate import Sampling
from modjax.errors import InputError
from modjax.finished.text import (
    SampleRequest,
    Speaker,
    check_routing,
    of_pretrained,
    of_run,
    sample,
)
from modjax.nn import Cache, LayerCache
from modjax.specs import Dense, MoD, Predictor, TopK
from tests.nn.small import behind_a_block
from tests.training.tiny import run_spec

PIECES = Pieces(train_sentencepiece(["the cat sat on the mat, and the hat fell\n"] * 20, 290))
GREEDY = Sampling(temperature=0)
EOS = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer(LayerCache):
    overflow_B: jax.Array

    def overflow(self) -> jax.Array:
        return self.overflow_B


class Script(nnx.Module):
    """A model that predicts a fixed text: token i + 1 after the token at position i."""

    def __init__(self, tokens_BL, vocab):
        self.tokens_BL = nnx.Param(jnp.array(tokens_BL, jnp.int32))
        self.vocab = vocab

    def reader(self, *, max_length, routing, slack, key):
        def read(tokens_BL, lengths_B, cache):
            if cache is None:
                cache = Cache((Layer(jnp.zeros_like(lengths_B)),), jnp.zeros_like(lengths_B))
                missed_B = jnp.zeros_like(lengths_B)
            else:
                missed_B = lengths_B
            depths_BL = (cache.positions_B[:, None] + jnp.arange(tokens_BL.shape[1])[None]) % 2
            positions_B = cache.positions_B + lengths_B
            overflow_B = cache.layers[0].overflow_B + missed_B
            return self._logits(positions_B), Cache((Layer(overflow_B),), positions_B), depths_BL

        return read

    def _logits(self, positions_B):
        next_B = self.tokens_BL[...][jnp.arange(len(positions_B)), positions_B]
        return jax.nn.one_hot(next_B, self.vocab)


def script(rows, codec=None, vocab=259, vocab_size=None):
    """Returns a model that continues prompts to `rows`, given as text or tokens."""
    codec = codec or PIECES
    ids = [codec.encode(row, "row") if isinstance(row, str) else list(row) for row in rows]
    tokens_BL = np.zeros((len(rows), 120), np.int32)
    for b, row in enumerate(ids):
        tokens_BL[b, : len(row)] = row
    graphdef, params = nnx.split(Script(tokens_BL, vocab))
    layers = behind_a_block("expert_choice", capacity=0.25, causal=Predictor())
    spec = run_spec(layers=layers, vocab_size=300).model
    size = vocab_size or codec.vocab_size
    return Speaker(spec, graphdef, params, codec, codec.encode, (EOS,), size)


def say(run, prompts, *, tokens=80, **options):
    """Returns the samples, and the parts of the first that were streamed."""
    written = []
    request = SampleRequest(prompts, tokens, sampling=GREEDY, **options)
    samples = sample(run, request, written.append)
    assert "".join(written) == samples[0].prompt + samples[0].text
    for s in samples:
        assert b"".join(s.pieces).decode(errors="replace") == s.prompt + s.text
        assert len(s.pieces) == len(s.depths)
    return samples, written


BYTES = Bytes()
# Longer than two chunks of the stream, and not only ASCII.
LONG = "The quick brown fox, 日本 and ü, jumps; then it rests: END, or so. And again, it jumps."


def test_a_text_is_continued_to_the_number_of_tokens_and_streamed_in_parts():
    (found,), written = say(script([LONG], BYTES), ["The q"], tokens=70)
    assert found.text == LONG.encode()[5:75].decode()
    assert len(written) == 4, "the prompt, two parts of 32 and one of 6"
    assert found.depths == [i % 2 for i in range(75)]
    assert found.overflow == 70


def test_characters_that_lie_across_two_parts_of_the_stream_arrive_whole():
    for start in range(1, 6):
        text = "x" * start + "日本語" * 12
        (found,), written = say(script([text], BYTES), ["x"])
        assert "\ufffd" not in "".join(written[:3])
        assert found.text == text.encode()[1:81].decode(errors="replace")


@pytest.mark.parametrize(
    "end", ["END", "jumps", "o", "e quick", "日本", "rests: END, or so. And again"]
)
def test_a_text_ends_before_its_stop_wherever_that_lies(end):
    (found,), _ = say(script([LONG], BYTES), ["Th"], stop=("nowhere", end))
    assert found.text == LONG[2 : LONG.index(end, 2)]
    assert len(found.depths) == len((found.prompt + found.text).encode())


def test_the_first_stop_of_several_counts_and_each_row_ends_by_itself():
    rows = [LONG, LONG[::-1], "tokens that end" + "."]
    run = script([rows[0], rows[1], [*BYTES.encode(rows[2], ""), EOS, *[70] * 90]], BYTES)
    prompts = [row[:3] for row in rows]
    found, _ = say(run, prompts, stop=("END", "jumps", "tse"))
    assert found[0].text == LONG[3 : LONG.index("jumps")]
    assert found[1].text == rows[1][3 : rows[1].index("tse")]
    assert found[2].text == rows[2][3:], "the end of the document is no text"


def test_a_stop_is_found_however_the_vocabulary_spells_it():
    text = "the cat sat on the mat, and the hat fell\n" * 3
    ids = PIECES.encode(text, "row")
    (found,), _ = say(script([ids], vocab=290), ["the"], stop=("t on th",))
    assert PIECES.encode("t on th", "") != ids[3:6]
    assert found.text == " cat sa"
    assert len(found.pieces) < len(found.prompt + found.text), "pieces, not characters"


def test_tokens_beyond_the_vocabulary_are_not_drawn():
    model = script([LONG], BYTES, vocab_size=ord("u") + 3)  # the model would say "u" next
    (found,), _ = say(model, ["The q"], tokens=1)
    assert found.text != "u"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, r"--prompt = '': is empty"),
        ("a\udce9", {}, r"--prompt = 'a\\udce9': is not UTF-8 at character 1"),
        ("ü", {}, r"--prompt = 'ü': has tokens beyond the vocabulary's 150"),
        ("a", {"stop": ("",)}, "--stop = '': is empty"),
        ("a", {"stop": ("\udce9",)}, "--stop = .*: is not UTF-8"),
        (
            "a",
            {"routing": "trained"},
            "--routing = 'trained': looks at tokens that are not drawn yet",
        ),
        ("a", {"routing": "both"}, "--routing = 'both': must be one of"),
        (
            "a",
            {"routing": "auxiliary"},
            "--routing = 'auxiliary': must be one of trained, causal, paced, predictor, threshold",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(prompt, options, message):
    run = script(["ab"], BYTES, vocab_size=150)
    run = run._replace(graphdef=None)  # whatever uses the model fails otherwise
    with pytest.raises(InputError, match=message) as caught:
        say(run, [prompt], **options)
    assert "\n" not in str(caught.value)


def test_a_routing_must_be_one_of_the_model_that_never_looks_ahead():
    def check(*layers, routing="causal"):
        check_routing(run_spec(layers=layers).model, routing)

    learned = MoD(Dense(), causal=Predictor(), rule=TopK(auxiliary=1.0))
    check(Dense(), learned)
    check(Dense(), learned, routing="auxiliary")
    check(Dense())
    with pytest.raises(InputError, match="--routing = 'paced': must be one of trained, causal, th"):
        check(Dense(), MoD(Dense()), routing="paced")
    with pytest.raises(InputError, match="'trained': looks at tokens that are not drawn yet"):
        check(Dense(), routing="trained")
    with pytest.raises(InputError, match="has no rule that never looks ahead: MoD has causal=Pre"):
        check(*behind_a_block("received"))


def test_the_space_that_a_vocabulary_puts_before_a_text_is_not_shown():
    pytest.importorskip("tokenizers")  # of the module with the small models
    from tests.data.codecs.small import sentencepiece_model

    model = sentencepiece_model(["the cat sat"] * 20, size=270, add_dummy_prefix=True)
    codec = Pieces(model.serialized_model_proto())
    (found,), _ = say(script(["the cat sat on it"], codec, vocab=270), ["the cat"], tokens=4)
    assert b"".join(found.pieces).startswith(b"the cat s")


def tokenizer(more=(), pre_tokenizer=None, **settings):
    """Returns the codec of a tokenizer.json that begins a prompt with <s>."""
    pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers, processors

    from modjax.data.codecs.tokenizer import Settings, Tokenizer
    from tests.data.codecs.small import byte_level

    made = byte_level(size=290)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(list(more))
    if pre_tokenizer is not None:
        made.pre_tokenizer = getattr(pre_tokenizers, pre_tokenizer)()
    return Tokenizer(made.to_str().encode(), "here", Settings(**settings))


def pretrained(codec, text, chat=False, end=(), prompt=()):
    """Returns a pretrained model that says `prompt`, `text` and `end`, and then always "!"."""
    ids = [*prompt, *codec.encode(text, ""), *end, *codec.encode("!" * 60, "")]
    made = script([ids], codec, vocab=300)
    return of_pretrained(made.spec, made.graphdef, made.weights, codec, chat=chat)


@pytest.mark.parametrize("end", [1, 4])
def test_a_pretrained_model_begins_a_prompt_and_ends_at_any_of_its_ends(end):
    codec = tokenizer(special={"eos_token": "</s>"}, eos_ids=(4,))
    model = pretrained(codec, "The brown fox, 日本\n\tjumps", end=(end,), prompt=(0,))
    (found,), _ = say(model, ["The brown"], tokens=60)
    assert found.text == " fox, 日本\n\tjumps", "the position of each token counts <s>"
    assert found.pieces[0] == b"" and len(found.pieces) == len(found.depths)
    assert found.routed_blocks == 1


def test_a_chat_is_written_by_the_template_and_shown_without_it():
    template = "<s>user:{{ messages[0].content }}<|im_end|>"
    codec = tokenizer(eos_ids=(4,), template=template)
    prompt = [0, *codec.encode("user:Hi", ""), 4]
    model = pretrained(codec, "Hello!", chat=True, end=(4,), prompt=prompt)
    written = []
    (found,) = sample(model, SampleRequest(["Hi"], 40, sampling=GREEDY), written.append)
    assert (found.prompt, found.text) == ("Hi", "Hello!")
    assert "".join(written) == "Hi\nHello!"
    assert b"".join(found.pieces) == b"user:HiHello!"


def test_a_prompt_of_a_pretrained_model_may_spell_special_tokens_and_one_of_a_run_may_not():
    codec = tokenizer()
    model = pretrained(codec, "x")
    assert model.encode("<|im_start|>a", "--prompt") == [0, 3, *codec.encode("a", "")]
    cache = SimpleNamespace(codec=lambda: codec, manifest=SimpleNamespace(eos_id=4, vocab_size=290))
    spec = SimpleNamespace(model=model.spec)
    run = SimpleNamespace(spec=spec, model=model, weights=model.weights, cache=cache)
    speaker = of_run(run)
    assert speaker.encode("<|im_start|>a", "--prompt") == codec.encode("<|im_start|>a", "")
    assert (speaker.eos_ids, speaker.spec, speaker.vocab_size) == ((4,), model.spec, 290)


def test_a_special_token_without_an_embedding_is_refused_where_it_is_used():
    codec = tokenizer(special={"eos_token": "</s>"}, more=["<image>"], eos_ids=(290,))
    model = pretrained(codec, "Hello")
    spec = run_spec(layers=(Dense(),), vocab_size=290).model
    model = of_pretrained(spec, model.graphdef, model.weights, codec, chat=False)
    assert (list(model.eos_ids), model.vocab_size) == ([1], 290)
    with pytest.raises(InputError, match=r"--prompt = '<image>': has tokens beyond the .* 290"):
        say(model, ["<image>"])


def test_a_pretrained_model_that_cannot_speak_is_refused_in_one_line():
    codec = tokenizer()
    model = pretrained(codec, "x")
    parts = (model.graphdef, model.weights)
    small = run_spec(vocab_size=260).model
    losing = tokenizer(pre_tokenizer="WhitespaceSplit")
    with pytest.raises(InputError, match=r"^--pretrained = None: has no tokenizer: needs a"):
        of_pretrained(model.spec, *parts, None, chat=False)
    with pytest.raises(InputError, match=r"^model.vocab_size = 260: is too small for its"):
        of_pretrained(small, *parts, codec, chat=False)
    with pytest.raises(InputError, match=r"^tokenizer = 'here': has no chat template"):
        say(of_pretrained(model.spec, *parts, codec, chat=True), ["Hi"])
    with pytest.raises(InputError, match=r"^tokenizer = 'here': has no exact bytes for its tokens"):
        say(of_pretrained(model.spec, None, None, losing, chat=False), ["Hi"])
