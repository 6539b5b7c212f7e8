"""Text from a pretrained model in a folder, against transformers' own generation."""

import json

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("transformers", reason="make test-parity")
pytest.importorskip("torch", reason="make test-parity")

import torch
import transformers
from tokenizers import processors

from modjax.cli.main import main
from modjax.pretrained import from_pretrained
from tests.data.codecs.small import byte_level

pytestmark = pytest.mark.filterwarnings("ignore")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with random weights, as transformers saves it with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    made = byte_level("llama-bpe", size=300)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=[1, 4],
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return path


def theirs(folder, ids) -> str:
    """Returns transformers' greedy continuation. It draws no id beyond the tokenizer, as we."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    beyond = list(range(len(tokenizer), 304))
    options = dict(max_new_tokens=NEW, do_sample=False, suppress_tokens=beyond, pad_token_id=1)
    ids = torch.tensor([ids])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["def f(", " 日本 <|im_start|>", "The 1234 cats"])
def test_a_greedy_continuation_is_that_of_transformers(folder, prompt, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = [f"--pretrained={folder}", f"--prompt={prompt}", f"--tokens={NEW}", "--temperature=0"]
    assert main(["sample", *options, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["text"] == theirs(folder, tokenizer(prompt)["input_ids"]) != ""
    assert main(["sample", *options, "--json", "--chat"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found["text"] == theirs(folder, ids)


def test_the_tokenizer_comes_with_the_model_or_is_none(folder, tmp_path):
    found = from_pretrained(folder)
    assert found.tokenizer is not None and found.tokenizer.eos_ids == (1, 4)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    assert from_pretrained(tmp_path).tokenizer is None
