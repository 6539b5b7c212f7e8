"""Formats of counts, FLOPs budgets and times."""

import math


def count(value: float) -> str:
    """Returns a count as text with three digits and a suffix: 842, 12.3k, 4.56M."""
    if not math.isfinite(value):
        return "unbounded"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def budget(flops: float) -> str:
    """Returns a FLOPs budget as text: 6e18, 2.5e12."""
    mantissa, _, exponent = f"{flops:.3g}".partition("e")
    if not exponent:
        mantissa, _, exponent = f"{flops:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def clock(seconds: float) -> str:
    """Returns seconds as text: 42s, 3m05s or 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
