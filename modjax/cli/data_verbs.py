"""The verbs that prepare and show token caches: data prepare and data show.

Imports are inside the functions, so that every verb starts as fast as what it needs.
"""

import argparse
import sys

from modjax.cli.verbs import print_json
from modjax.specs import to_dict


def prepare(args: argparse.Namespace) -> None:
    from modjax.data.prepare.prepare import prepare

    path = prepare(
        name=args.name,
        text_files=args.text,
        tfds_name=args.tfds,
        vocab=args.vocab,
        data_dir=args.data_dir,
        force=args.force,
    )
    print(path)


def show(args: argparse.Namespace) -> None:
    from modjax.cli.tables import data_text
    from modjax.data.cache import list_caches
    from modjax.data.manifest import Manifest

    caches = list_caches(args.data_dir)
    manifests = [one for one in caches if isinstance(one, Manifest)]
    for unreadable in caches:
        if not isinstance(unreadable, Manifest):
            print(f"modjax: {unreadable}", file=sys.stderr)
    if args.json:
        return print_json([to_dict(manifest) for manifest in manifests])
    if manifests or not caches:
        print(data_text(manifests) if manifests else f"nothing is prepared in {args.data_dir}")
