"""The colours of `modjax sample --show-depth`."""

import re

from modjax.cli.depths import coloured
from modjax.finished.text import Sample


def shades(shown):
    """Returns the text and the background colour of each token on a terminal."""
    tokens = shown[: shown.index("\n\n0 ")].split("\x1b[48;5;")[1:]
    return [(plain(token.partition("m")[2]), int(token.partition("m")[0])) for token in tokens]


def plain(shown):
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_colours_tell_how_many_blocks_each_token_used():
    pieces = [b"a", b"\xc3", b"\xbc", b"b\n", b"c"]
    shown = coloured(Sample("a", "übc", pieces, [0, 1, 2, 4, 2], 4, 0))
    (a, low), (none, _), (u, middle), (b, high), (c, again) = shades(shown)
    assert (a, none, u, b, c) == ("a", "", "ü", "b\n", "c")
    assert len({low, middle, high}) == 3 and again == middle
    legend = shown.splitlines()[-1]
    assert plain(legend).split() == "0 4 routed blocks used; 1.80 on average".split()
    ends = re.findall(r"\x1b\[48;5;(\d+)m", legend)
    assert (int(ends[0]), int(ends[-1])) == (low, high)
    assert "b\x1b[0m\n" in shown, "no colour runs on over a line's end"
    cut = coloured(Sample("a", "\ufffd", [b"a", b"\xc3"], [0, 1], 4, 0))
    assert plain(cut).startswith("a\ufffd\n"), "as the text is printed without colours"
