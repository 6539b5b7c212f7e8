"""Checks the tables and sentences of the records against the runs that they keep.

Usage: python -m experiments.check [--write] [NAME ...]
With --write, the tables are renewed first. experiments/NAME/record.py describes its README:
  tables(): the tables between markers, by name.
  claims(): the sentences that rest on the runs, with their numbers, and whether each holds.
  GIVEN: the texts with numbers that no kept file holds.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/record.py"))
TABLE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"^    .*$", re.MULTILINE)
# Text whose numbers need no claim: code, links, papers, sections, levels of intervals and tests.
NAMED = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \S+|[Ss]ection \S+|95% (t-)?interval|test at 5%")
NUMBER = re.compile(r"\d+\.\d+\b|\d+%|\b\d+ of (?:the |its )?\d+")


def load(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}.record")


def renew(readme: str, record: ModuleType) -> str:
    """Returns the README with its tables made anew from the runs."""
    tables = record.tables()
    return TABLE.sub(lambda m: m[1] + tables.get(m[2], m[3].strip()) + "\n" + m[4], readme)


def plain(text: str) -> str:
    """Returns the text without bold markers and line breaks."""
    return " ".join(text.replace("**", "").split())


def table_faults(readme: str, tables: dict[str, str]) -> list[str]:
    marked = {m[2]: m[3].strip() for m in TABLE.finditer(readme)}
    found = [f"table {name}: only in one of README and record" for name in marked.keys() ^ tables]
    for name in sorted(marked.keys() & tables):
        old, new = marked[name].split("\n"), tables[name].split("\n")
        found += [
            f"table {name}: {a!r} should be {b!r}" for a, b in zip(old, new, strict=False) if a != b
        ]
        if len(old) != len(new):
            found.append(f"table {name}: {len(old)} lines should be {len(new)}")
    return found


def faults(readme: str, record: ModuleType) -> list[str]:
    """Returns the contradictions between a README and its runs, one line each."""
    found = table_faults(readme, record.tables())
    prose = plain(CODE.sub("", TABLE.sub("", readme)))
    for says, holds in record.claims():
        if not holds:
            found.append(f"does not hold: {says}")
        if plain(says) not in prose:
            found.append(f"is not said: {says}")
        prose = prose.replace(plain(says), "...")
    for given in record.GIVEN:
        if plain(given) not in prose:
            found.append(f"given, but not said: {given}")
        prose = prose.replace(plain(given), "...")
    rest = NAMED.sub("", prose)
    found += [
        f"no claim covers {m[0]} in: {rest[max(0, m.start() - 60) : m.end() + 30]}"
        for m in NUMBER.finditer(rest)
    ]
    return found


def main(arguments: list[str]) -> int:
    wrong = False
    for name in [a for a in arguments if a != "--write"] or NAMES:
        path, record = HERE / name / "README.md", load(name)
        readme = path.read_text(encoding="utf-8")
        if "--write" in arguments:
            readme = renew(readme, record)
            path.write_text(readme, encoding="utf-8")
        found = faults(readme, record)
        wrong |= bool(found)
        print(f"{name}: {len(found)} faults", *found, sep="\n  ")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
