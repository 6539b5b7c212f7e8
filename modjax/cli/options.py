"""The options that several verbs of the command line share, and the help texts of all verbs."""

import os
from pathlib import Path
from typing import Any

from modjax.bench import BENCHMARKS

Option = tuple[str, dict[str, Any]]


def option(flag: str, **keywords: Any) -> Option:
    """Returns the arguments of `argparse.ArgumentParser.add_argument`."""
    return flag, keywords


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(os.environ.get("MODJAX_DATA") or os.path.join(base, "modjax"))


CONFIG = option(
    "--config",
    required=True,
    metavar="FILE.py[:ARGUMENT]",
    help="the experiment, whose get_config is called with ARGUMENT; override its values with "
    "--config.GROUP.FIELD=VALUE",
)
WORKDIR = option(
    "--workdir",
    required=True,
    type=Path,
    help="the folder of the runs, or one in a bucket, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER",
)
DATA_DIR = option(
    "--data-dir",
    type=Path,
    default=_default_data_dir(),
    help="the folder of the token caches, or a bucket such as gs://BUCKET/FOLDER; default "
    "$MODJAX_DATA, else modjax in the user's data folder ($XDG_DATA_HOME)",
)
JOBS = option(
    "--jobs",
    type=int,
    metavar="N",
    help="runs at a time (default 1), which share the cores of a machine evenly; small models are "
    "fastest with one per core, an accelerator takes 1; short for --engine.jobs",
)
ENGINE = option(
    "--engine",
    metavar="NAME",
    help="what does the runs, see launch/README.md; default: that of the config's group `engine`, "
    "or local processes; set its options with --engine.FIELD=VALUE",
)
LOSS = option(
    "--loss",
    choices=("causal", "trained"),
    default="causal",
    help="compare arms by their loss under routing that never looks ahead (causal, the default; "
    "for a dense run, its only loss), or by the loss of all runs as trained",
)
SIZE = option(
    "--size",
    choices=("non_embedding", "total", "active"),
    default="non_embedding",
    help="the parameters that count as a model's size; a token uses the active ones (default "
    "non_embedding)",
)
SLACK = option(
    "--slack",
    type=float,
    metavar="X",
    help="give a routed block cache slots for X times its capacity; tokens beyond them skip the "
    "block and are counted; default: slots for all",
)
IMPORTS = option(
    "--imports",
    action="append",
    default=[],
    metavar="FILE.py|MODULE",
    help="first import this file or module, which registers layers of the runs or engines; may be "
    "repeated. Nothing that a run's folder names is imported",
)
OTHER_CODE = option(
    "--other-code",
    action="store_true",
    help="continue, or read, runs of other code or of another environment; the record of a "
    "continued run says so",
)
JSON = option("--json", action="store_true", help="print JSON")
TOPOLOGY = option(
    "--topology",
    metavar="CHIP:SIDExSIDE",
    help="the TPU slice to compile for, such as v5e:4x4, v6e:16x16 or v5p:2x2x1",
)
SLICES = option(
    "--slices", type=int, default=1, metavar="N", help="the number of such slices; default 1"
)
RUN_OF_PLAN = option("--run", metavar="RUN_ID", help="the run of the sweep's plan")

PREPARE = """make the token cache of a corpus: the only step that needs TensorFlow.

Without options: the Python standard library's own source, which needs no download."""
PLAN = """print the runs of a sweep: sizes, tokens, steps, FLOPs, time and problems.

Trains nothing. Flags: off-budget (achieved FLOPs differ by more than 1%), off-centre (the grid's
centre is more than 0.15 decades from the predicted optimum), can't tell (the expected interval of
the optimum is wider than the sampled sizes), repeats data, too many epochs (more than
data.max_epochs). A sweep refuses cells that are off-budget or take too many epochs. If the data is
not prepared, the table is printed with epochs "?" and the exit code is 2.

With --topology, compiles the train step of every run for a TPU slice, as `modjax aot` does, a
minute or more each. Adds its memory per chip, its time by the compiler's estimate, and the flag
"does not fit"."""
CHECK = """test whether the layers of a config look ahead: what each claims, and what was seen.

Edits each token of a short text in turn, and compares all outputs before the edit, for every
distinct layer and every routing that it has. A sweep does so before it trains, and refuses a layer
that looks ahead although it claims not to."""
SWEEP = """do the runs of a plan, and print a table of the results.

Finished runs are never repeated. A run that dies is started once more, then given up. Several
sweeps may share a folder."""
STATUS = "show which runs are done, running, failed or waiting"
STOP = """stop a sweep once the runs under way have saved their state.

Its launchers end with code 75. The same command continues the sweep."""
LOGS = "print the end of what a run has printed"
RETRY = """try a run again that was given up.

A sweep that still runs takes it up, and so does the next one."""
FIT = """print optima, power laws and the gap between arms.

Arms are compared by their causal loss: under routing that never looks ahead, as sampling needs it.
Runs that have none, such as runs with expert choice, are named and shown apart."""
REPORT = """write figures, fits and tables into one HTML file.

Arms are compared by the same loss as in `modjax fit`, see `modjax fit --help`."""
TRAIN = """train one run, with the same folders and records as a sweep.

A config with a `sweep` group describes many runs: --run takes an id from `modjax plan --json`. If
`config.base` is a pretrained model, prints which weights are new."""
TUNE = """train the routers of layers around a pretrained model, and write them to a file.

Calls get_config() of --config with --pretrained. The model's own weights stay as they are. Writes
runs/ID/routers.safetensors in --workdir: the layers, and the weights that the pretrained model has
not. Thresholds that follow the scores of the batch are measured anew, on larger batches. Use the
file by `modjax sample --pretrained=PATH --routers=FILE`.

--measure-layers drops each part in turn, and evaluates each time on the data of the config. Three
evaluations a block take long: choose few sequences by --config.train.eval_sequences=8."""
EVAL = """evaluate finished runs on validation text under another routing than that of training.

Prints the paired difference from the loss as trained, with its standard error. For every routed
block it prints accuracy, precision and recall against top-k, the share of positions processed, the
share dropped (--slack), and the largest share processed in one sequence."""
SAMPLE = """continue a prompt with a finished run or a pretrained model.

Routing never looks ahead, and each block caches the tokens that it processed. The continuation of a
single prompt is printed while it is drawn."""
SCORE = """score held-out text, in nats per token, or likelihood tasks, with intervals.

A model that has the routing "all", where every position is processed, is compared with itself."""
EXPORT = """write a finished run for transformers: config.json, safetensors, vocabulary, model card.

Picks the first model family that computes the same, such as llama for a dense run and mixtral for a
mixture of experts. Refuses layers that transformers cannot express, such as MoD. With --pretrained,
writes a pretrained model, such as one in GGUF, again: in its own family, without a model card."""
FLOPS = """print the parameters and FLOPs of a model by component, and in sum under each convention.

For a config with a `sweep` group: the run that --run names, or else the middle size of every arm at
the largest budget."""
AOT = """compile a run for a TPU slice, which need not be there, and print what the compiler says.

Compiles the real train step, or with --decode the loop of sampling. Prints its memory per chip,
estimated cycles by part of the model, share of the chips' peak, and collectives. The compiler's
estimates of time are no measurements, and leave out collectives, sorts, gathers and scatters, which
are listed. Needs the compiler, pip install 'modjax[aot]', but no TPU. A compilation takes a minute
or more. Exits with 2 if the run does not fit."""
BENCH = """measure a performance figure against its target.

""" + "\n".join(f"  {name:8} {text}" for name, text in BENCHMARKS.items())
