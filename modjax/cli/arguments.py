"""The parser of the command line: its verbs, their options and their help."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import modjax
from modjax.cli import aot, finished_verbs, options, tuning, verbs
from modjax.cli.options import (
    CONFIG,
    DATA_DIR,
    ENGINE,
    IMPORTS,
    JOBS,
    JSON,
    LOSS,
    OTHER_CODE,
    RUN_OF_PLAN,
    SIZE,
    SLACK,
    SLICES,
    TOPOLOGY,
    WORKDIR,
    Option,
    option,
)
from modjax.errors import MOST_SAID, one_line

DESCRIPTION = """\
isoFLOP sweeps of Mixture-of-Depths and other conditional computation, in JAX.

  modjax data prepare                                  make the token cache, once
  modjax plan   --config=configs/tiny.py               show the runs of a sweep and their cost
  modjax sweep  --config=configs/tiny.py --workdir=work/tiny --jobs 2
  modjax status --workdir=work/tiny                    from another terminal
  modjax report --workdir=work/tiny                    figures, fits and tables in one HTML file
"""
OVERRIDES = """\
Config values are overridden as --config.GROUP.FIELD=VALUE, for example
  modjax plan --config=configs/tiny.py --config.sweep.budgets=1e11,4e11 --config.train.b2=0.99

"""
ROUTING = "causal (each layer's own rule that never looks ahead), or the name of a rule"
RESUMES = """\
Run the same command again to continue where it stopped.

"""
RESUMING = ("prepare", "sweep", "train", "tune")
KEEPING = (*RESUMING, "report")  # verbs whose result is in files, so that lost output is no failure
WRITING = (*KEEPING, "stop", "retry")  # into --workdir
EPILOG = """\
exit codes: 0 done; 2 bad input, or a machine that refuses (a full disk, no memory), explained in
one line; 3 ended, but some runs were given up or not evaluated; 70 a fault of modjax, in one line
that names the file with its traceback; 75 stopped by SIGTERM, 130 by Ctrl-C: both save the state.
"""


class _Once(argparse.Action):
    """Stores the value of an option, and refuses to store a second one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            parser.error(f"argument {option_string}: given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **keywords: Any):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=raw, **keywords)
        self.register("action", None, _Once)  # for every option that names no other action

    def error(self, message: str) -> NoReturn:
        said = one_line(message, MOST_SAID)
        self.exit(verbs.BAD_INPUT, f"modjax: {said} (see `{self.prog} --help`)\n")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser. A parsed namespace has `verb`, the function to call with it."""
    parser = _Parser(prog="modjax", description=DESCRIPTION, epilog=OVERRIDES + RESUMES + EPILOG)
    parser.add_argument("--version", action="version", version=f"modjax {modjax.__version__}")
    commands = parser.add_subparsers(metavar="VERB", required=True)
    data = commands.add_parser("data", help="prepare text, or show the prepared corpora")
    _add_data_verbs(data.add_subparsers(metavar="VERB", required=True))
    _add_sweep_verbs(commands)
    _add_finished_verbs(commands)
    _add(commands, "flops", verbs.flops, options.FLOPS, CONFIG, JSON, RUN_OF_PLAN)
    flag, keywords = TOPOLOGY
    topology = option(flag, **keywords | {"required": True})
    decode = option("--decode", action="store_true", help="compile the loop of sampling instead")
    described = (topology, SLICES, decode)
    _add(commands, "aot", aot.aot, options.AOT, CONFIG, JSON, RUN_OF_PLAN, *described)
    name = option("name", metavar="NAME", help="the figure, or `all`")
    _add(commands, "bench", verbs.bench, options.BENCH, JSON, name)
    return parser


def _add(commands: Any, name: str, function: Callable, text: str, *options: Option) -> Any:
    """Adds a verb and returns its parser. `modjax --help` shows the first clause of `text`."""
    verb = commands.add_parser(
        name,
        help=text.split(":")[0].split(".")[0],
        description=text,
        epilog=OVERRIDES * (CONFIG in options) + RESUMES * (name in RESUMING) + EPILOG,
    )
    verb.set_defaults(verb=function, called=name)
    _add_options(verb, *options)
    return verb


def _add_options(parser: Any, *options: Option) -> None:
    for flag, keywords in options:
        parser.add_argument(flag, **keywords)


def _add_data_verbs(commands: Any) -> None:
    prepare = _add(commands, "prepare", verbs.prepare, options.PREPARE, DATA_DIR)
    _add_options(
        prepare.add_mutually_exclusive_group(),
        option(
            "--text",
            nargs="+",
            default=[],
            metavar="FILE",
            type=Path,
            help='plain text, or JSON lines with a "text" (.jsonl); either may be .xz or .gz',
        ),
        option("--tfds", metavar="NAME", help="c4, lm1b, or any TFDS name with text"),
    )
    vocab = "bytes (the default), sentencepiece:SIZE or a SentencePiece FILE.model"
    tokenizer = (
        "the tokenizer of a pretrained model: its folder, a tokenizer.json or a GGUF file; in a "
        "config, set data.vocab=NAME.json, where NAME is the folder's name, or the file's without "
        "its suffix"
    )
    _add_options(
        prepare.add_mutually_exclusive_group(),
        option("--vocab", help=vocab),
        option("--tokenizer", type=Path, metavar="PATH", help=tokenizer),
    )
    _add_options(
        prepare,
        option("--name", help="the name of the corpus; default stdlib, text or the TFDS name"),
        option("--force", action="store_true", help="replace a prepared corpus"),
    )
    show = "list the prepared corpora and their counts"
    _add(commands, "show", verbs.show, show, DATA_DIR, JSON)


def _add_sweep_verbs(commands: Any) -> None:
    speed = option("--workdir", type=Path, help="take the speed from the finished runs in there")
    noise = option(
        "--noise",
        type=float,
        metavar="NATS",
        help="standard deviation of a run's loss, for the prediction of the fit (default 0.023, "
        "as measured in experiments/isoflop)",
    )
    distributed = option(
        "--distributed",
        action="store_true",
        help="train together with other hosts that run the same command; see launch/README.md",
    )
    costs = (JOBS, JSON, speed, noise, TOPOLOGY, SLICES)
    _add(commands, "plan", verbs.plan, options.PLAN, CONFIG, DATA_DIR, *costs)
    _add(commands, "check", verbs.check, options.CHECK, CONFIG, JSON)
    running = (CONFIG, WORKDIR, DATA_DIR, OTHER_CODE, JSON)
    lease = option(
        "--lease",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="where locks of files do not hold between machines, as on gcsfuse: take over a run "
        "that has been silent for so long; all sweeps of a folder need the same option; default in "
        "a bucket: 120",
    )
    _add(commands, "sweep", verbs.sweep, options.SWEEP, *running, JOBS, ENGINE, IMPORTS, lease)
    _add(commands, "status", verbs.status, options.STATUS, WORKDIR, JSON)
    _add(commands, "stop", verbs.stop, options.STOP, WORKDIR)
    for name, verb, text in (
        ("logs", verbs.logs, options.LOGS),
        ("retry", verbs.retry, options.RETRY),
    ):
        run = option("run", metavar="RUN", help="the id of the run, as `modjax status` prints it")
        _add(commands, name, verb, text, run, WORKDIR)
    _add(commands, "fit", verbs.fit, options.FIT, WORKDIR, LOSS, SIZE, JSON)
    _add(commands, "report", verbs.report, options.REPORT, WORKDIR, LOSS, SIZE)
    _add(commands, "train", verbs.train, options.TRAIN, *running, RUN_OF_PLAN, distributed)
    model = "the pretrained model: a folder with config.json, or a GGUF file"
    base = option("--pretrained", required=True, type=Path, metavar="PATH", help=model)
    shared = (CONFIG, *running[2:], RUN_OF_PLAN, base)
    tune = _add(commands, "tune", tuning.tune, options.TUNE, *shared)
    measure = "instead, print how much the loss grows without each attention, MLP and block"
    _add_options(
        tune.add_mutually_exclusive_group(required=True),
        option("--workdir", type=Path, help="the folder of the runs"),
        option("--measure-layers", action="store_true", help=measure),
    )


def _add_finished_verbs(commands: Any) -> None:
    shared = (DATA_DIR, IMPORTS, OTHER_CODE, SLACK, JSON)
    evaluate = (
        option("--run", metavar="RUN_ID", help="one run; default: every run with a router"),
        option("--routing", required=True, help=f"trained, {ROUTING}"),
    )
    _add(commands, "eval", finished_verbs.evaluate, options.EVAL, WORKDIR, *shared, *evaluate)
    sample = _add(commands, "sample", finished_verbs.sample, options.SAMPLE, *shared)
    _add_model(sample)
    _add_options(
        sample.add_mutually_exclusive_group(required=True),
        option("--prompt", help="the text to continue"),
        option("--prompts", type=Path, metavar="FILE", help="a file with one prompt a line"),
    )
    top_p = "draw from the fewest likeliest tokens that sum to this probability; default 1, all"
    stop = "end before this text; may be repeated"
    routers = "the routers file of `modjax tune` that belongs to --pretrained"
    chat = "render the prompt as a user's message, by the chat template of --pretrained"
    depth = (
        "colour each token by how many routed blocks it used; without colours (a pipe, NO_COLOR), "
        "print that number and the token on a line of their own"
    )
    _add_options(
        sample,
        option("--routers", type=Path, metavar="FILE", help=routers),
        option("--chat", action="store_true", help=chat),
        option("--routing", default="causal", help=ROUTING),
        option("--tokens", type=int, default=256, metavar="N", help="new tokens; default 256"),
        option("--temperature", type=float, default=1.0, help="default 1; 0 is greedy"),
        option("--top-k", type=int, default=0, help="draw from the k likeliest; default 0, all"),
        option("--top-p", type=float, default=1.0, help=top_p),
        option("--seed", type=int, default=0, help="the seed of the draws; default 0"),
        option("--stop", action="append", default=[], metavar="TEXT", help=stop),
        option("--show-depth", action="store_true", help=depth),
    )
    reading = (DATA_DIR, IMPORTS, OTHER_CODE)
    score = _add(commands, "score", finished_verbs.score, options.SCORE, *reading, JSON)
    _add_model(score)
    score.set_defaults(chat=False)
    files = {"nargs": "+", "default": [], "metavar": "FILE", "type": Path}
    _add_options(
        score.add_mutually_exclusive_group(required=True),
        option("--text", help="held-out text, as in `modjax data prepare`", **files),
        option("--tasks", help="likelihood tasks, a request per line, see README.md", **files),
    )
    routers = "routers files of `modjax tune` for --pretrained, each scored against the same base"
    _add_options(
        score,
        option("--routers", help=routers, **files),
        option("--routing", default="causal", help=ROUTING),
        option("--seq-len", type=int, default=512, help="tokens of a window of text; default 512"),
        option("--limit", type=int, metavar="N", help="the first N documents of each file"),
    )
    export = _add(commands, "export", finished_verbs.export, options.EXPORT, *reading)
    _add_model(export)
    _add_options(
        export,
        option("--out", required=True, type=Path, metavar="DIR", help="a new or an empty folder"),
        option(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="dtype to write; default float32, or bfloat16 if the --pretrained files have it",
        ),
    )


def _add_model(parser: Any) -> None:
    """Adds the options that name a folder of runs or a pretrained model."""
    flag, keywords = WORKDIR
    model = "a pretrained model instead: a folder with config.json, or a GGUF file"
    _add_options(
        parser.add_mutually_exclusive_group(required=True),
        option(flag, **keywords | {"required": False}),
        option("--pretrained", type=Path, metavar="PATH", help=model),
    )
    _add_options(parser, option("--run", metavar="RUN_ID", help="the run, if there are several"))
