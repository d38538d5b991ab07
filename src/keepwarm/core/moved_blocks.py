"""The blocks of coding agents' system prompts that change with the directory, repository and day.

Theory of operation. An agent ends or interrupts a long prompt that stays the same with a few lines
that don't: where it works, what day it is, how the repository stands. Templates of the ChatML kind
put tools behind the system text, so those lines undo the tools as well. They are known here by
their form, not by their words, which differ from version to version:

1. *status*: a text's last paragraphs, a sentence with a name in front (`gitStatus: This is ...`),
   short fields, and a list of commits (Claude Code).
2. *tail*: a text's last lines, each a label with a date or a directory (pi).
3. *element*: `<env>` ... `</env>` with a label in each line (opencode, subagents of Claude Code).
4. *list*: items that are a label and a value, the first with a directory, another with none
   (Claude Code).
5. *mention*: a sentence with a path in backquotes that holds the directory of 2 to 4, or a name
   made from a directory, wherever it stands (memory folders of Claude Code and Qwen Code).

Nothing is taken from a prompt that isn't an agent's: one with a tool that runs commands and one
that reads files, under the names that these clients give them.

Invariants: every word of the text is kept or taken; taking twice is taking once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from keepwarm.core.volatile import find_volatile

# A tool that runs commands and one that reads files, by client. They have kept their names over all
# versions, and a request of an agent (or of its subagents) has both.
_AGENTS = (
    frozenset(("Bash", "Read")),  # Claude Code
    frozenset(("bash", "read")),  # opencode, pi
    frozenset(("run_shell_command", "read_file")),  # Qwen Code, Gemini CLI
)

_DIRECTORY = r"(?:~?/|[A-Za-z]:[\\/])[^\n`<>]{1,1000}"
_LABEL = r"[^\W\d][\w' -]{0,60}"
_FIELD = rf"[ \t]*{_LABEL}:[ \t][^\n<>]{{1,300}}"

_ELEMENT = re.compile(rf"(?m)^[ \t]*<env>\n(?:{_FIELD}\n|[ \t]*\n){{1,30}}[ \t]*</env>[ \t]*$")
_LIST = re.compile(
    rf"(?m)^[ \t]*[-*] {_LABEL}: {_DIRECTORY}"
    rf"(?:\n[ \t]*[-*] (?:{_LABEL}: [^\n]{{1,120}}|{_DIRECTORY})$)*"
)
_DIRECTORY_FIELD = re.compile(rf"(?m)^[ \t]*(?:[-*] )?{_LABEL}: (?P<directory>{_DIRECTORY})$")
_LABELLED = re.compile(rf"^{_LABEL}: (?P<value>[^\n]{{1,200}})$")
_IS_DIRECTORY = re.compile(rf"^{_DIRECTORY}$")

# The paragraphs of a status, from its end: commits by their abbreviated names, fields, its head.
_COMMITS = re.compile(r"^[^\n:.]{1,60}:(?:\n\w{7,40} [^\n]*)+\s*$|^[^\n:.]{1,60}:\s*$")
_STATUS_FIELD = re.compile(r"^[^\n:.]{1,90}:(?: [^\n]{0,200}$|\n)")
_STATUS_HEAD = re.compile(r"^\w{2,20}: [^\n]{30,600}$")
_MOST_STATUS_FIELDS = 8

_QUOTED_PATH = re.compile(rf"`({_DIRECTORY})`")
# A folder whose name is a whole directory's, `/` written as `-`, or a digest of it.
_NAMED_AFTER_DIRECTORY = re.compile(r"/(?:-[\w.]+(?:-[\w.]+)+|[0-9a-f]{32,64})(?:/|$)")
_MOST_MENTION_CHARS = 1200
_MOST_MENTIONS = 8


class Taken(NamedTuple):
    """A system prompt's texts without their blocks, and the blocks in their order."""

    texts: list[str]
    blocks: list[str]


def is_agent(tools: Collection[str]) -> bool:
    """Whether a request with tools of these names is a coding agent's whose blocks are known."""
    return any(agent.issubset(tools) for agent in _AGENTS)


def take_blocks(texts: Sequence[str]) -> Taken:
    """Take the blocks out of an agent's system prompt, given as the texts that it consists of."""
    kept: list[str] = []
    blocks: list[str] = []
    directories: set[str] = set()
    for text in texts:
        rest, found = _without_forms(text)
        kept.append(rest)
        blocks += found
        for block in found:
            directories |= {match["directory"] for match in _DIRECTORY_FIELD.finditer(block)}
    mentioned = [_mentions(text, directories) for text in kept]
    if sum(map(len, mentioned)) <= _MOST_MENTIONS:
        for index, spans in enumerate(mentioned):
            blocks += [kept[index][start:end].strip() for start, end in spans]
            kept[index] = _without(kept[index], spans)
    return Taken(kept, blocks) if any(text.strip() for text in kept) else Taken(list(texts), [])


def _without_forms(text: str) -> tuple[str, list[str]]:
    """Forms 1 to 4; a text's end is looked at again behind each that was taken from it."""
    at_end: list[str] = []
    while cut := _status(text) or _tail(text):
        at_end.insert(0, text[cut:].strip("\n"))
        text = text[:cut].rstrip("\n")
    inside: list[str] = []
    for form in (_ELEMENT, _LIST):
        spans = []
        for match in form.finditer(text):
            start, end = match.span()
            if _is_fenced(text, start) or (form is _LIST and _is_of_directories(match[0])):
                continue
            if form is _ELEMENT:
                start = _with_heading(text, start)
            inside.append(text[start:end])
            spans.append((start, min(end + 1, len(text))))
        text = _without(text, spans)
    return text, [*inside, *at_end]


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    done = 0
    pieces = []
    for start, end in spans:
        pieces.append(text[done:start])
        done = end
    return "".join([*pieces, text[done:]])


def _is_of_directories(items: str) -> bool:
    """Whether every item has a directory: where things lie, not where and how somebody works."""
    lines = items.split("\n")
    return sum(bool(_DIRECTORY_FIELD.match(line)) for line in lines) == len(lines)


def _status(text: str) -> int:
    """Where a repository's status that ends the text begins; 0: there is none."""
    paragraphs = text.rstrip().split("\n\n")
    if len(paragraphs) < 4 or not _COMMITS.match(paragraphs[-1]):
        return 0
    for index in range(len(paragraphs) - 2, max(len(paragraphs) - 3 - _MOST_STATUS_FIELDS, 0), -1):
        paragraph = paragraphs[index]
        if _STATUS_HEAD.match(paragraph) and paragraph.endswith("."):
            is_whole = len(paragraphs) - index > 2
            return sum(len(one) + 2 for one in paragraphs[:index]) if is_whole else 0
        if not _STATUS_FIELD.match(paragraph):
            return 0
    return 0


def _tail(text: str) -> int:
    """Where the dates and directories that end the text begin; 0: it ends otherwise."""
    end = len(text.rstrip("\n"))
    start = end
    while start > 0:
        before = text.rfind("\n", 0, max(start - 1, 0)) + 1
        match = _LABELLED.match(text[before:start].rstrip("\n"))
        if not match or not _changes(match["value"]):
            break
        start = before
    return start if start < end else 0


def _changes(value: str) -> bool:
    kinds = {found.kind for found in find_volatile(f"Now: {value}")}
    return bool(_IS_DIRECTORY.match(value)) or bool(kinds & {"date", "time"})


def _with_heading(text: str, start: int) -> int:
    """A block's start with the line before it where that announces the block."""
    before = text.rfind("\n", 0, max(start - 1, 0)) + 1
    return before if text[before:start].rstrip().endswith(":") else start


def _is_fenced(text: str, place: int) -> bool:
    return len(re.findall(r"(?m)^[ \t]*```", text[:place])) % 2 == 1


def _mentions(text: str, directories: Collection[str]) -> list[tuple[int, int]]:
    """Sentences with a path in backquotes that is a directory's own, as places in the text."""
    names = {*directories, *(re.sub(r"[^A-Za-z0-9]", "-", one) for one in directories)}
    found: list[tuple[int, int]] = []
    for match in _QUOTED_PATH.finditer(text):
        path = match[1]
        if not (_NAMED_AFTER_DIRECTORY.search(path) or any(name in path for name in names)):
            continue
        start, end = _sentence(text, *match.span())
        is_new = not found or start >= found[-1][1]
        if is_new and end - start <= _MOST_MENTION_CHARS and not _is_fenced(text, start):
            found.append((start, end))
    return found


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence around a place, with the blank behind it; a line's end ends a sentence."""
    line = text.rfind("\n", 0, start) + 1
    before = text.rfind(". ", line, start)
    ends = [place for place in (text.find(". ", end), text.find("\n", end)) if place >= 0]
    last = min(ends, default=len(text))
    return (before + 2 if before >= 0 else line), last + 2 if text[last : last + 1] == "." else last
