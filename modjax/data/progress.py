"""Lines on stderr that say how far long work is."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


def say(said: float, progress: str) -> float:
    """Prints a line unless the last one is recent. said, returned: the time of the last line."""
    if time.monotonic() - said < SECONDS_BETWEEN_LINES:
        return said
    print(f"modjax: {progress}", file=sys.stderr, flush=True)
    return time.monotonic()
