"""Docstrings of modjax/ begin with a subject or a verb, see CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

MODJAX = Path(__file__).parents[1] / "modjax"
REFUSED = re.compile(r"(What|Of|Those|That|As far|Whether|How|Where|Which)\b")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def refused(source: str) -> list[str]:
    """Returns the first line of each docstring that begins with a refused word."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED))
    docstrings = filter(None, map(ast.get_docstring, nodes))
    return [text.splitlines()[0] for text in docstrings if REFUSED.match(text)]


def test_no_docstring_begins_with_a_refused_word():
    found = {str(file): refused(file.read_text()) for file in MODJAX.rglob("*.py")}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_a_refused_word_is_found_in_modules_classes_and_functions():
    function = '    def f(self):\n        """Often."""'
    source = f'"""What a module is."""\nclass A:\n    """Of a."""\n{function}'
    assert refused(source) == ["What a module is.", "Of a."]
