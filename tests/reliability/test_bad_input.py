"""Bad input gives one line that names the field and exit code 2, soon, and starts nothing."""

import time
from pathlib import Path

import pytest

from modjax.cli.main import main

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = f"--config={CONFIGS / 'tiny.py'}"
SINGLE = f"--config={CONFIGS / 'single.py'}"
LONG = "x" * 5000
DIGITS, HEX = "9" * 5000, f"0x{'f' * 5000}"
DEEP, CHAIN = "Dense(" * 500 + ")" * 500, "1+" * 3000 + "1"
FILES = {
    "file": "text",
    "exit.py": "import sys\nsys.exit(0)\n",
    "raises.py": "1 / 0\n",
    "nothing.py": "",
    "number.py": "def get_config():\n    return 3\n",
    "endless.py": "def get_config():\n    return get_config()\n",
    "leaves.py": "def get_config():\n    raise SystemExit\n",
    "syntax.py": "def (:\n",
}

OVERRIDES = {
    "sweep.sizes": ["0", "-1", "1000000000", "x", "nan", ""],
    "sweep.budgets": ["1e300", "1e-300", "-1", "inf", "nan", "0", "x"],
    "sweep.spread": ["1e9", "0", "-1", "nan", "inf"],
    "sweep.optimum.params": ["1e300", "1e-300", "0", "nan", "-3"],
    "sweep.optimum.budget": ["1e-300", "0", "nan", "1e300"],
    "sweep.optimum.exponent": ["1e6", "-1e6", "nan", "inf"],
    "sweep.shape.width_multiple": ["0", "3", "-2", "1000000000000", "x"],
    "sweep.shape.layer_multiple": ["0", "3", "-1"],
    "sweep.shape.aspect": ["0", "-1", "nan"],
    "sweep.shape.ff_multiple": ["0", "nan", "1e-9"],
    "sweep.recipe.batch_size": ["0", "-1", "1000000000000", "x"],
    "sweep.recipe.batch_exponent": ["1e6", "nan", "inf"],
    "sweep.recipe.learning_rate": ["0", "-1", "nan", "1e400"],
    "sweep.recipe.warmup_fraction": ["2", "-1", "nan"],
    "sweep.seeds": [
        "2147483648",
        "-1",
        "x",
        "1e30",
        DIGITS,
        HEX,
        CHAIN,
        "-" * 3000 + "1",
        "[" * 999,
    ],
    "sweep.flops_per_second": ["0", "nan", "-1"],
    "sweep.baseline": ["none", ""],
    "sweep.arms.mod12.forward_ratio": ["0", "1e300", "-1", "nan"],
    "sweep.arms.mod12.layers": [
        "MoD(capacity=0)",
        "MoD(capacity=2)",
        "MoD(capacity=nan)",
        "MoD(capacity=1e999)",
        "MoD(capacity='x')",
        "MoD(slack=None)",
        "MoD(causal=Predictor(weight=1e999))",
        "Attention(rope=Rope(1e999))",
        "",
        "3",
        "dense",
        "Dense(",
        "Dense()()",
        "Moe()",
        "Repeat()",
        "Repeat(Dense()), Dense()",
        DEEP,
        CHAIN,
        HEX,
        f"MoD(capacity={DIGITS})",
        "MoD(capacity=1e308)",
        "MoD(capacity=1j)",
        "\x1b[2J",
        "\udc80",
    ],
    "train.seq_len": ["0", "-1", "1000000000000000000000", "x", HEX, "9" * 400],
    "train.b2": ["1", "-1", "nan", "x"],
    "train.eval_sequences": ["0", "-1", "x"],
    "data.name": ["", "..", "../up", "a/b", ".hidden", "-rf", "a\nb", "\udc80", "CON", LONG],
    "data.vocab": ["", "..", "/", "\x1b[2J", LONG],
    "data.seed": ["-1", HEX, DIGITS],
    "model.streams": ["3", "Dense()", HEX, CHAIN, "[" * 999],
    "model.head_dim": ["0", "x", HEX, CHAIN],
    "data.max_epochs": ["0", "-1", "nan"],
    "execution.layer_loop": ["slow"],
    "execution.log_every": ["0", "-1"],
    "model.vocab_size": ["0", "-1", "x", HEX, "9" * 400],
    "train.colour": ["red"],
    "colour": ["red"],
}
COMMANDS = [
    *(
        ["plan", TINY, f"--config.{name}={value}"]
        for name, values in OVERRIDES.items()
        for value in values
    ),
    *(["plan", f"--config={name}"] for name in (*FILES, "none.py", ".", LONG)),
    *(
        [verb, f"--workdir={where}"]
        for verb in ("status", "fit", "report")
        for where in ("file", "file/work", LONG, "none")
    ),
    *(["sweep", TINY, f"--workdir={where}"] for where in ("file", "file/work", LONG, "/proc/none")),
    *(["eval", f"--workdir={where}", "--routing=predictor"] for where in ("file", LONG, "none")),
    *(["sample", f"--workdir={where}", "--prompt=x"] for where in ("file", LONG, "none")),
    *(
        ["sample", "--workdir=none", *options]
        for options in (
            [],
            ["--prompt="],
            ["--prompts=none"],
            [f"--prompts={LONG}"],
            ["--prompts=."],
            ["--prompt=x", "--prompts=file"],
            ["--prompt=x", "--tokens=0"],
            ["--prompt=x", "--tokens=10000000"],
            ["--prompt=x", "--temperature=nan"],
            ["--prompt=x", "--temperature=-1"],
            ["--prompt=x", "--top-p=0"],
            ["--prompt=x", "--top-p=2"],
            ["--prompt=x", "--top-k=-1"],
            ["--prompt=x", "--seed=-1"],
            ["--prompt=x", "--seed=1e9"],
            ["--prompt=x", "--slack=nan"],
            ["--prompt=x", "--slack=0"],
        )
    ),
    ["eval", "--workdir=none", "--routing=fly"],
    ["eval", "--workdir=none"],
    ["plan", TINY, "--jobs=0"],
    ["plan", TINY, "--jobs=x"],
    ["plan"],
    ["brew"],
    [],
    ["flops", SINGLE, "--config.model.num_heads=5"],
    ["flops", TINY, "--run=none"],
    ["train", SINGLE, "--run=none", "--workdir=w"],
    ["bench", "tea"],
    ["data"],
    ["data", "prepare", "--text", "none"],
    ["data", "prepare", "--tfds=x", "--text", "file"],
    ["data", "prepare", f"--name={LONG}", "--text", "file"],
    ["data", "prepare", "--data-dir=file", "--text", "file"],
    ["data", "show", "--data-dir=file/data"],
    ["plan", TINY, "--workdir=a", "--workdir=b"],
    ["plan", TINY, TINY],
    ["plan", TINY, f"--jobs={HEX}"],
    ["plan", TINY, f"--jobs={DIGITS}"],
    ["plan", TINY, "--config.train.b2=0.9", "--config.train.b2=0.9"],
    ["plan", TINY, f"--config.{LONG}=1"],
    ["plan", TINY, "--config.\x1b[2J=1"],
    ["\x1b[2J"],
    [LONG],
    ["plan", TINY, f"--config.{LONG}"],
    ["plan", f"--config={CONFIGS / 'tiny.py'}\x1b[2J"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_one_line_and_exit_code_2(command, data_dir, tmp_path, monkeypatch, capsys, count):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    if command and command[0] in ("sweep", "plan", "train"):
        command = [*command, f"--data-dir={data_dir}"]
    started = time.monotonic()
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("modjax: ") and err[:-1].isprintable() and len(err) < 2000
    assert err.endswith("\n")
    assert time.monotonic() - started < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES), "nothing was begun"
    count("bad inputs that got one line")
