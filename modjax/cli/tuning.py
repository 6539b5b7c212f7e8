"""The verb that trains the routers of a pretrained model, or measures its layers.

Imports are inside the functions, so that each verb imports only what it needs.
"""

import argparse
import os
import sys

from modjax.backend import start, starting
from modjax.bucket import write
from modjax.cli import verbs
from modjax.errors import require
from modjax.files import is_copy


def tune(args: argparse.Namespace) -> int:
    from modjax.records import run_dir
    from modjax.scaling.formatting import count
    from modjax.scaling.sweep import open_data

    args.config = f"{args.config}:{args.pretrained}"
    experiment = verbs.experiment_of(args)
    spec = verbs.choose(args, experiment.specs)
    given = os.path.realpath(args.pretrained)
    accepted = f"must be {given}, the model of --pretrained and the argument of get_config()"
    require(spec.base == given, "config.base", spec.base, accepted)
    if args.measure_layers:
        from modjax.cli.tables import dropped_text

        start()
        with starting():
            from modjax.finished.sublayers import measure_layers

        found = measure_layers(spec, args.data_dir)
        values = [one._asdict() for one in found]
        print(verbs.json_text(values) if args.json else dropped_text(found))
        return 0
    accepted = "must be 'routers': `modjax train` trains all weights"
    require(spec.train.trained == "routers", "train.trained", spec.train.trained, accepted)
    with starting():
        from modjax.pretrained import open_files, save_routers

    open_files(given)  # raises InputError for the folder of a run
    fingerprint = open_data(experiment, args.data_dir).manifest.fingerprint
    verbs.say_new_weights(spec)
    if code := verbs.run_plan(args, experiment, fingerprint, only=spec):
        return code
    folder = run_dir(args.workdir, spec.run_id)
    file = folder / "routers.safetensors"
    if not file.exists():
        start()
        with starting():
            from modjax.finished.calibration import calibrated
            from modjax.finished.runs import load

        run = load(folder, other_code=args.other_code)
        save_routers(file, spec.model, calibrated(run, args.data_dir), given)
        if is_copy(file):
            write(file, file.read_bytes())
    said = f"{file} ({count(file.stat().st_size)}B)"
    print(said, file=sys.stderr if args.json else sys.stdout)
    return 0
