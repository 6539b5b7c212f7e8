"""`modjax sample --pretrained`, with a stand-in for the reader of pretrained models."""

import json
import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from flax import nnx

pytest.importorskip("tokenizers")

from modjax.data.codecs.tokenizer import Settings, Tokenizer
from modjax.nn import Transformer
from modjax.specs import Dense, ModelSpec
from tests.data.codecs.small import byte_level
from tests.training.tiny import run_spec

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEMPLATE = "<|im_start|>{{ messages[0].content }}<|im_end|>"


class Pretrained(NamedTuple):
    spec: ModelSpec
    graphdef: Any
    weights: Any
    tokenizer: Tokenizer | None


@pytest.fixture
def open_as(monkeypatch):
    """Makes `from_pretrained` return a small dense model with a chat template, or another."""
    opened = []

    def open_as(vocab_size=300, template: str | None = TEMPLATE):
        spec = run_spec(layers=(Dense(),), vocab_size=vocab_size).model
        graphdef, weights = nnx.split(Transformer(spec, rngs=nnx.Rngs(0)))
        settings = Settings(special={"eos_token": "</s>"}, template=template)
        tokenizer = Tokenizer(byte_level(size=290).to_str().encode(), "here", settings)

        def from_pretrained(path, routers=None):
            opened.append(str(path) if routers is None else f"{path} with {routers}")
            return Pretrained(spec, graphdef, weights, tokenizer)

        module = ModuleType("modjax.pretrained")
        module.from_pretrained = from_pretrained
        monkeypatch.setitem(sys.modules, "modjax.pretrained", module)
        return opened

    return open_as


def test_a_pretrained_model_continues_a_prompt(said, open_as):
    opened = open_as()
    arguments = ("sample", "--pretrained=a/model", "--prompt=def f(", "--tokens=9")
    code, out, err = said(*arguments, "--json")
    assert (code, err, opened) == (0, "", ["a/model"])
    (values,) = json.loads(out)
    assert values["prompt"] == "def f(" and values["text"]
    assert values["routed_blocks"] == 0 and set(values["depths"]) == {0}
    assert said(*arguments, "--routers=file") == (0, "def f(" + values["text"] + "\n", "")
    assert opened[1:] == ["a/model with file"]


def test_a_chat_puts_the_prompt_through_the_template(said, open_as):
    open_as()
    arguments = ("sample", "--pretrained=x", "--prompt=Hi", "--tokens=9", "--temperature=0")
    code, out, err = said(*arguments, "--chat", "--json")
    assert (code, err) == (0, "")
    (chat,), (plain,) = json.loads(out), json.loads(said(*arguments, "--json")[1])
    assert chat["prompt"] == "Hi" and chat["text"] != plain["text"]
    assert len(chat["depths"]) == len(plain["depths"]) + 2, "two special tokens of the template"
    assert said(*arguments, "--chat") == (0, "Hi\n" + chat["text"] + "\n", "")


def test_many_prompts_and_depths(said, open_as, tmp_path):
    open_as()
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n")
    code, out, err = said("sample", "--pretrained=x", f"--prompts={file}", "--tokens=3", "--chat")
    assert (code, err) == (0, "")
    assert out.startswith("a\n") and "\n\nb\n" in out
    code, out, err = said("sample", "--pretrained=x", "--prompt=ab", "--tokens=1", "--show-depth")
    assert (code, err) == (0, "") and out.startswith("0\t'a'\n0\t'b'\n")


def test_a_pretrained_model_is_scored(said, open_as, tmp_path):
    opened = open_as()
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    arguments = ("--pretrained=a/model", f"--text={tmp_path / 'text.txt'}", "--seq-len=32")
    code, out, err = said("score", *arguments, "--json")
    assert (code, err, opened) == (0, "", ["a/model"])
    (found,) = json.loads(out)
    assert found["count"] > 50 and found["layers"] == {}
    assert found["measures"]["nats"]["score"]["value"] > 3
    code, out, err = said("score", *arguments, "--json", "--routers", "one", "two")
    assert (code, err, opened[1:]) == (0, "", ["a/model with one", "a/model with two"])
    assert json.loads(out) == [found | {"routers": name} for name in ("one", "two")]
    out = said("score", *arguments, "--routers", "one", "two")[1]
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["routers", "one", "two"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--pretrained=x", "--workdir=y"], "argument --workdir: not allowed with"),
        ([], "one of the arguments --workdir --pretrained is required"),
        (["--pretrained=x", "--run=y"], "--run = 'y': cannot be combined with --pretrained"),
        (
            ["--workdir=x", "--chat"],
            "--chat = True: needs --pretrained: a run has no chat templ",
        ),
        (["--workdir=x", "--routers=y"], "--routers = 'y': needs --pretrained"),
        (["--pretrained=x", "--routing=trained"], "--routing = 'trained': looks at tokens"),
        (["--pretrained=x", "--routing=paced"], "--routing = 'paced': must be one of"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(said, open_as, arguments, reason):
    open_as()
    code, out, err = said("sample", "--prompt=x", *arguments)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"template": None}, "tokenizer = 'here': has no chat template: give it a plain prompt"),
        ({"template": "{% if %}"}, "chat template = 'here': cannot be rendered: TemplateSyntaxErr"),
        ({"vocab_size": 280}, "model.vocab_size = 280: is too small for its tokenizer, which has"),
    ],
)
def test_a_model_that_cannot_chat_is_refused_in_one_line(said, open_as, model, reason):
    open_as(**model)
    code, out, err = said("sample", "--pretrained=x", "--prompt=x", "--chat")
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_vocab_and_tokenizer_exclude_each_other(said):
    code, out, err = said("data", "prepare", "--vocab=bytes", "--tokenizer=x", "--data-dir=y")
    assert (code, out) == (2, "") and "argument --tokenizer: not allowed with" in err
    code, out, err = said("data", "prepare", "--tokenizer=nowhere", "--data-dir=y")
    assert (code, out) == (2, "") and err.startswith("modjax: tokenizer = 'nowhere': no tokenizer")
