#!/usr/bin/env python3
"""Keep the documentation within 100 columns.

wrap_docs.py           wrap paragraphs and list items that have a longer line
wrap_docs.py --check   exit 1 if there are such lines

Tables, code and headings stay as they are, and so does a single word that is longer, as a link's
address. The tiers' own texts in `configs/` are prompts, not documentation.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 100
_FENCE = re.compile(r"\s*```")
_ITEM = re.compile(r"(\s*)((?:[-*+]|\d+[.)])\s+)?(.*)")
# A line that begins like this is no part of a paragraph, or would be none if it were wrapped here.
_BLOCK = re.compile(r"\s*(```|[-*+]\s|\d+[.)]\s|\||#|>|<|!\[)")
# Code and the words of a link stay together, and a number with its unit.
_WORD = re.compile(
    r"(?:`[^`]*`|\[[^\]]{1,60}\](?=\()|[^\s`\[]|[`\[])+"
    r"(?:(?<=\d) (?:%|[kMGT]?B|ms|s)(?!\w)\S*)?"
)
_MARKER = re.compile(r"([-+*]|\d+[.)]|#+|>|=+|\|.*)$")


def pages() -> Iterator[Path]:
    """Every page of documentation."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield ROOT / "configs" / "prompt-tiers" / "README.md"


def wrapped(text: str) -> str:
    """The page with its long paragraphs and list items wrapped; other lines as they were."""
    lines = text.split("\n")
    out: list[str] = []
    index, is_code = 0, False
    while index < len(lines):
        line = lines[index]
        index += 1
        if _FENCE.match(line):
            is_code = not is_code
        is_indented = line.startswith("    ") and (not out or not out[-1].strip())
        match = _ITEM.fullmatch(line)
        assert match
        indent, marker, words = match[1], match[2] or "", match[3]
        if is_code or is_indented or not words or _BLOCK.match(indent + words):
            out.append(line)
            continue
        block = [line]
        while index < len(lines) and lines[index].strip() and not _BLOCK.match(lines[index]):
            block.append(lines[index])
            index += 1
        if any(len(one) > COLUMNS for one in block):
            words = " ".join([words, *(one.strip() for one in block[1:])])
            block = _fill(words, first=indent + marker, others=indent + " " * len(marker))
        out += block
    return "\n".join(out)


def _fill(words: str, *, first: str, others: str) -> list[str]:
    units: list[str] = []
    for word in _WORD.findall(words):
        # At the beginning of a line "200." would be the number of an item.
        if units and _MARKER.match(word):
            units[-1] += f" {word}"
        else:
            units.append(word)
    lines = [first + units[0]]
    for unit in units[1:]:
        if len(lines[-1]) + 1 + len(unit) <= COLUMNS:
            lines[-1] += f" {unit}"
        else:
            lines.append(others + unit)
    return lines


def main() -> None:
    """Wrap, or check."""
    parser = argparse.ArgumentParser(description="Keep the documentation within 100 columns.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = wrapped(text)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(
            f"{page.relative_to(ROOT)}: {'has lines over' if check else 'wrapped at'} 100 columns"
        )
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
