"""Samples for the terminal that show how many routed blocks processed each token."""

import codecs

from modjax.finished.text import Sample

# Colours of a 256-colour terminal, from no routed block (light) to all of them (dark).
COLOURS = (255, 230, 229, 222, 215, 209, 203, 197, 161, 125)


def coloured(sample: Sample) -> str:
    """Returns prompt and continuation, with a darker background for tokens of greater depth."""
    out, decoder = [], codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece, depth in zip(sample.pieces, sample.depths, strict=True):
        shade = round(depth / max(sample.routed_blocks, 1) * (len(COLOURS) - 1))
        text = decoder.decode(piece).replace("\n", "\x1b[0m\n")
        out.append(f"\x1b[48;5;{COLOURS[shade]}m\x1b[38;5;16m{text}")
    legend = "".join(f"\x1b[48;5;{colour}m\x1b[38;5;16m  " for colour in COLOURS)
    return (
        f"{''.join(out)}{decoder.decode(b'', final=True)}\x1b[0m\n\n"
        f"0 {legend}\x1b[0m {sample.routed_blocks} routed blocks used; {_mean(sample)} on average"
    )


def numbered(sample: Sample) -> str:
    """Returns prompt and continuation as lines, each with the depth of a token and the token."""
    tokens = zip(sample.depths, sample.pieces, strict=True)
    lines = [f"{depth}\t{_quoted(piece)}" for depth, piece in tokens]
    mean = f"{_mean(sample)} of {sample.routed_blocks} routed blocks used on average"
    return "\n".join([*lines, "", mean])


def _quoted(piece: bytes) -> str:
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:  # a token may be a part of a character
        return repr(piece)


def _mean(sample: Sample) -> str:
    return f"{sum(sample.depths) / len(sample.depths):.2f}"
