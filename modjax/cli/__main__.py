"""Runs the command line as `python -m modjax.cli`."""

import sys

from modjax.cli.main import main

sys.exit(main())
