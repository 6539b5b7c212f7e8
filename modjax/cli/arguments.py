"""The verbs of the command line, their options, and what `--help` says of them."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import modjax
from modjax.bench import BENCHMARKS
from modjax.cli import data_verbs, finished_verbs, verbs
from modjax.cli.options import OPTIONS
from modjax.errors import MOST_SAID, one_line

DESCRIPTION = """\
isoFLOP sweeps of Mixture-of-Depths and other conditional computation, in JAX.

  modjax data prepare                                  make the token cache, once
  modjax plan   --config=configs/tiny.py               what a sweep would run and cost
  modjax sweep  --config=configs/tiny.py --workdir=work/tiny --jobs 2
  modjax status --workdir=work/tiny                    from another terminal
  modjax report --workdir=work/tiny                    figures, fits and tables in one HTML file
"""
OVERRIDES = """\
Config values are overridden as --config.GROUP.FIELD=VALUE, for example
  modjax plan --config=configs/tiny.py --config.sweep.budgets=1e11,4e11 --config.train.b2=0.99

"""
ROUTING = "causal, by each layer's own rule that never looks ahead, or the name of a rule"
RESUMES = """\
The same command again goes on where it was stopped.

"""
RESUMING = ("prepare", "sweep", "train")
KEEPING = (*RESUMING, "report")  # verbs whose work lies in files, whatever becomes of their output
EPILOG = """\
exit codes: 0 done; 2 bad input, or a machine that refuses (a full disk, no memory), said in one
line; 3 ended, but with runs given up, or not evaluated; 70 a fault of modjax, in one line that
names the file with its traceback; 75 stopped by SIGTERM, 130 by Ctrl-C; both saved their state.
"""


class _Once(argparse.Action):
    """Stores the value of an option, which may be given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            parser.error(f"argument {option_string}: given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.register("action", None, _Once)  # of every option that names no other

    def error(self, message: str) -> NoReturn:
        said = one_line(message, MOST_SAID)
        self.exit(verbs.BAD_INPUT, f"modjax: {said} (`{self.prog} --help` says more)\n")


def make_parser() -> argparse.ArgumentParser:
    """What it parses has a `verb`, the function to be called with it."""
    parser = _Parser(
        prog="modjax",
        description=DESCRIPTION,
        epilog=OVERRIDES + RESUMES + EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"modjax {modjax.__version__}")
    commands = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def add(name: str, function: Any, text: str, *options: str, to: Any = commands) -> Any:
        verb = to.add_parser(
            name,
            help=text.split(":")[0].split(".")[0],
            description=text,
            epilog=OVERRIDES * ("config" in options) + RESUMES * (name in RESUMING) + EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.set_defaults(verb=function, called=name)
        for option in options:
            name_or_flag, keywords = OPTIONS[option]
            verb.add_argument(name_or_flag, **keywords)
        return verb

    data = commands.add_parser("data", help="prepare text, or show what is prepared")
    inner = data.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    prepare = add("prepare", data_verbs.prepare, PREPARE, "data_dir", to=inner)
    source = prepare.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        type=Path,
        help='plain text, or JSON lines with a "text" (.jsonl); either may be .xz or .gz',
    )
    source.add_argument("--tfds", metavar="NAME", help="c4, lm1b, or any TFDS name with text")
    prepare.add_argument("--name", help="what to call it; default stdlib, text or the TFDS name")
    prepare.add_argument(
        "--vocab", default="bytes", help="bytes (the default), sentencepiece:SIZE or a .model"
    )
    prepare.add_argument("--force", action="store_true", help="prepare again what is there")
    add(
        "show",
        data_verbs.show,
        "the prepared corpora and their counts",
        "data_dir",
        "json",
        to=inner,
    )

    plan = add("plan", verbs.plan, PLAN, "config", "data_dir", "jobs", "json")
    plan.add_argument("--workdir", type=Path, help="take the speed from the runs finished here")
    plan.add_argument(
        "--noise",
        type=float,
        metavar="NATS",
        help="standard deviation of a run's "
        "loss, for what the sizes and seeds can tell (default 0.023, as measured in "
        "experiments/isoflop)",
    )
    add("check", verbs.check, CHECK, "config", "json")
    add(
        "sweep",
        verbs.sweep,
        SWEEP,
        "config",
        "workdir",
        "data_dir",
        "jobs",
        "other_code",
        "json",
    )
    add("status", verbs.status, "what is done, running, failed or waiting", "workdir", "json")
    add("fit", verbs.fit, FIT, "workdir", "loss", "size", "json")
    add("report", verbs.report, REPORT, "workdir", "loss", "size")
    train = add("train", verbs.train, TRAIN, "config", "workdir", "data_dir", "other_code", "json")
    train.add_argument("--run", metavar="RUN_ID", help="which run of a sweep's plan")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several hosts that run this same command; see launch/README.md",
    )
    finished = ("workdir", "data_dir", "imports", "other_code", "slack", "json")
    evaluate = add("eval", finished_verbs.evaluate, EVAL, *finished)
    evaluate.add_argument("--run", metavar="RUN_ID", help="one run; else every one with a router")
    evaluate.add_argument("--routing", required=True, help=f"trained, {ROUTING}")
    sample = add("sample", finished_verbs.sample, SAMPLE, *finished)
    sample.add_argument("--run", metavar="RUN_ID", help="which run; may be left out for one")
    sample.add_argument("--routing", default="causal", help=ROUTING)
    prompt = sample.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="a batch: one prompt a line")
    sample.add_argument("--tokens", type=int, default=256, metavar="N", help="default 256")
    sample.add_argument("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    sample.add_argument("--top-k", type=int, default=0, help="of the k likeliest; default 0, all")
    sample.add_argument("--top-p", type=float, default=1.0, help="of this mass; default 1, all")
    sample.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    sample.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again",
    )
    sample.add_argument(
        "--show-depth",
        action="store_true",
        help="colour each token by how many routed blocks it used; without colours (a pipe, "
        "NO_COLOR), print that number and the token on a line of their own",
    )
    flops = add("flops", verbs.flops, FLOPS, "config", "json")
    flops.add_argument("--run", metavar="RUN_ID", help="which run of a sweep's plan")
    bench = add("bench", verbs.bench, BENCH, "json")
    bench.add_argument("name", metavar="NAME", help="which figure, or `all`")
    return parser


PREPARE = """make the token cache of a corpus: the one step that needs TensorFlow.

Without options: the Python standard library's own source, which needs no download."""
PLAN = """print the runs of a sweep: sizes, tokens, steps, FLOPs, time, and what is wrong with them.

Trains nothing. Flags: off-budget (achieved FLOPs differ by more than 1%), off-centre (the grid's
centre is more than 0.15 decades from the predicted optimum), can't tell (the expected interval of
the optimum is wider than the sampled sizes), repeats data, too many epochs (beyond
data.max_epochs). A sweep refuses off-budget cells and those with too many epochs. Where the data
is not prepared the table is printed too, with epochs "?"; the exit code is then 2."""
CHECK = """try whether the layers of a config look ahead: what each claims, and what was seen.

Edits every token of a short text in turn, and compares all outputs before the edit, for every
distinct layer and every routing that it has. A sweep does so before it trains, and refuses a layer
that looks ahead where it claims not to."""
SWEEP = """run a plan on local worker processes, and end with a table.

Finished runs are never repeated; what dies is run once more, what dies twice is given up; several
sweeps may share a folder."""
FIT = """optima, power laws and the gap between arms.

Arms are compared by their causal loss: under routing that never looks ahead, as a model is sampled
from. Runs that have none, such as those of experts that choose, are named and shown apart."""
REPORT = """figures, fits and tables in one HTML file.

Arms are compared by the same loss as by `modjax fit`, see `modjax fit --help`."""
TRAIN = """train one run, under the same folders and records as a sweep.

A config with a `sweep` group describes many runs: --run names one, as `modjax plan --json` does."""
EVAL = """the validation loss of finished runs under another routing than they were trained with.

Prints the paired difference from the loss as trained with its standard error, and what
every routed block decided: accuracy, precision and recall against top-k, the share of positions
processed, the share that found no room (--slack), and the largest share of one sequence."""
SAMPLE = """continue a prompt with a finished run, under routing that never looks ahead.

Caches hold what each block processed; the text of one prompt is printed while it is drawn."""
FLOPS = """parameters and FLOPs of a model by component, and in sum under each convention.

For a config with a `sweep` group: the run that --run names, or else the middle size of every arm at
the largest budget."""

BENCH = """measure a performance figure against its target.

""" + "\n".join(f"  {name:8} {text}" for name, text in BENCHMARKS.items())
