"""Opening the tokenizer of a model's folder: its ids, flags and chat template."""

import json

import pytest

pytest.importorskip("tokenizers")

from tokenizers import processors

from modjax.data.codecs.files import open_tokenizer, tokenizer_name
from modjax.errors import InputError
from tests.data.codecs.small import LINES, ODD, byte_level

NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
BEGINS = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
TEMPLATE = """{{ bos_token }}{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
<|im_end|>
{% endfor %}
{%- set ns = namespace(said=tools is none) %}
{%- if add_generation_prompt and ns.said %}
<|im_start|>assistant
{{ {"a": "<b>&é", "n": [1]} | tojson }} {{ messages | tojson(indent=2) }} {{ eos_token }}
{%- endif %}
"""
CHAT = [
    {"role": "user", "content": "  Why <b> & é?\n"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "So?"},
]


@pytest.fixture(scope="module")
def small():
    return byte_level()


def folder(path, tokenizer, **files):
    """Writes a model's folder: tokenizer.json, and `files` as NAME.json."""
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def test_a_folder_and_its_file_are_the_same(small, tmp_path):
    path = folder(tmp_path / "Model-1.5B", small, tokenizer_config=NAMES)
    ours, other = open_tokenizer(path), open_tokenizer(str(path / "tokenizer.json"))
    assert ours.content == other.content == (path / "tokenizer.json").read_bytes()
    assert ours.settings == other.settings and ours.eos_ids == (1,)
    assert [ours.encode(text, "x") for text in ODD] == [other.encode(text, "x") for text in ODD]
    assert tokenizer_name(path) == "Model-1.5B" and tokenizer_name(path / "x.y.gguf") == "x.y"


@pytest.mark.parametrize(
    ("files", "eos", "bos"),
    [
        ({}, (), None),
        ({"tokenizer_config": NAMES}, (1,), 0),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, (4,), None),
        ({"special_tokens_map": {"eos_token": "<unk>"}, "tokenizer_config": NAMES}, (1,), 0),
        ({"config": {"eos_token_id": 2, "bos_token_id": 3}}, (2,), 3),
        (
            {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [4, 1]}},
            (4, 1),
            None,
        ),
        ({"tokenizer_config": NAMES, "generation_config": {"eos_token_id": [4, 1]}}, (1, 4), 0),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}}, (), None),
    ],
)
def test_the_ends_of_text_are_those_of_all_files(files, eos, bos, small, tmp_path):
    ours = open_tokenizer(folder(tmp_path, small, **files))
    assert (ours.eos_ids, ours.bos_id) == (eos, bos)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("post", [None, BEGINS])
@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
def test_prompts_are_encoded_as_by_transformers(pre, post, flags, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_level(pre)
    if post is not None:
        tokenizer.post_processor = post
    path = folder(tmp_path, tokenizer, tokenizer_config=NAMES | flags)
    ours = open_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for text in [*ODD, *LINES[:50]]:
        assert ours.prompt(text, "text") == theirs(text)["input_ids"], text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt(text, "text", rendered=True) == ids


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["entry", "named", "file"])
def test_a_chat_is_written_as_by_transformers(place, small, tmp_path):
    transformers = pytest.importorskip("transformers")
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    entry = {"entry": TEMPLATE, "named": named, "file": "another"}[place]
    path = folder(tmp_path, small, tokenizer_config=NAMES | {"chat_template": entry})
    if place == "file":
        (path / "chat_template.jinja").write_text(TEMPLATE)
    ours = open_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for chat in (CHAT, CHAT[:1], CHAT * 3):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.chat(chat) == expected and "<|im_start|>assistant" in expected
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.prompt(expected, "text", rendered=True) == ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE, "cannot be rendered: TemplateError: no such role: other"),
        ("{% if %}", "cannot be rendered: TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 1 }}", "cannot be rendered: TypeError"),
        ("{{ messages.append(1) }}", "cannot be rendered: SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered: SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "cannot be rendered: SecurityError"),
        ("{% for i in range(1000000) %}{% endfor %}", "cannot be rendered: OverflowError"),
        ("{% include 'x' %}", "cannot be rendered: TypeError"),
        ([{"name": "tools", "template": "x"}], "has no chat template: give it a plain prompt"),
        (None, "has no chat template: give it a plain prompt"),
    ],
)
def test_a_template_that_fails_is_refused_in_one_line(template, reason, small, tmp_path):
    config = NAMES | {"chat_template": template}
    ours = open_tokenizer(folder(tmp_path, small, tokenizer_config=config))
    with pytest.raises(InputError, match=reason) as caught:
        ours.chat([{"role": "other", "content": "x"}])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_knows_the_time(small, tmp_path):
    config = NAMES | {"chat_template": "{{ strftime_now('%Y') | int > 2000 }}"}
    ours = open_tokenizer(folder(tmp_path, small, tokenizer_config=config))
    assert ours.chat(CHAT) == "True"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", "no tokenizer.json, or damaged"),
        ("tokenizer.json", None, "no tokenizer here: must be a folder with a tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json': is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json'.*must be a JSON object"),
        ("config.json", "\ufffe", "config.json': is not JSON"),
        ("config.json", '{"eos_token_id": "x"}', "eos_token_id of .* = 'x': must be token ids"),
        ("generation_config.json", '{"eos_token_id": [-1]}', r"eos_token_id of .*-1.*token ids"),
    ],
)
def test_bad_files_are_refused_in_one_line(name, content, reason, small, tmp_path):
    path = folder(tmp_path, small, tokenizer_config=NAMES)
    (path / name).write_text(content, "utf-16") if content else (path / name).unlink()
    if content is not None and content.isascii():
        (path / name).write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        open_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/x.json", "x\0y", ""])
def test_a_path_that_leads_nowhere_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^tokenizer = ") as caught:
        open_tokenizer(path)
    assert "\n" not in str(caught.value)
