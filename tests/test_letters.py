"""A letter of a shape suffix has one meaning: the legends of the computing folders agree."""

import ast
import re
from pathlib import Path

MODJAX = Path(__file__).parents[1] / "modjax"
FOLDERS = ("nn", "kernels", "training", "decoding")
FILES = sorted(file for folder in FOLDERS for file in (MODJAX / folder).rglob("*.py"))


def legend(source: str) -> dict[str, str]:
    """Returns the meaning of each letter that the module's docstring explains."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    listed = docstring.partition("Legend: ")[2].partition("\n\n")[0].partition(".")[0]
    pairs = (item.split(" ", 1) for item in re.split(r", ", " ".join(listed.split())) if item)
    return {letter: meaning for letter, meaning in pairs}


def test_a_letter_has_one_meaning_in_all_legends():
    meanings: dict[str, set[str]] = {}
    for file in FILES:
        for letter, meaning in legend(file.read_text()).items():
            meanings.setdefault(letter, set()).add(meaning)
    assert len(meanings) > 20
    assert {letter: found for letter, found in meanings.items() if len(found) > 1} == {}


def test_every_letter_of_a_suffix_is_in_the_legend_of_its_file():
    for file in FILES:
        source = file.read_text()
        suffixes = re.findall(r"\b[a-z]\w*_([A-Z][A-Z0-9]*)\b", source)
        used = set("".join(suffixes)) - set("0123456789")
        assert used <= set(legend(source)), file.name
