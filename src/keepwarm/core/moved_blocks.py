"""The blocks of coding agents' system prompts that change with the directory, repository and day.

Theory of operation. An agent ends or interrupts a long prompt that stays the same with a few lines
that don't: where it works, what day it is, how the repository stands. Templates of the ChatML kind
put tools behind the system text, so those lines undo the tools as well. They are known here by
their form, not by their words, which differ from version to version:

1. *status*: a text's last paragraphs, a sentence with a name in front (`gitStatus: This is ...`),
   short fields, and a list of commits (Claude Code); or a fenced block of lines that all begin with
   one word (`git: `), commits among them, with the line that announces it (Qwen Code).
2. *tail*: a text's last lines, each a label with a date or a directory (pi), or its last section
   under a directory's own file as its heading (Qwen Code's memory of a project).
3. *element*: `<env>` ... `</env>` or the like, with a label or a directory in each line (opencode,
   pi, subagents of Claude Code).
4. *list*: items that are a label and a value, the first with a directory, another with none
   (Claude Code).
5. *mention*: a sentence with a path in backquotes that holds the directory of 2 to 4, or a name
   made from a directory, wherever it stands (memory folders of Claude Code and Qwen Code).

Nothing is taken from a prompt that isn't an agent's: one with a tool that runs commands or
searches files and one that reads them, under the names that these clients give them.

Invariants: every word of the text is kept or taken; taking twice is taking once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple

from keepwarm.core.volatile import find_volatile

# Two tools by client. They have kept their names over versions, and an agent (or a subagent) sends
# both with every request.
_AGENTS = (
    frozenset(("Bash", "Read")),  # Claude Code
    frozenset(("bash", "read")),  # opencode, pi
    frozenset(("run_shell_command", "read_file")),  # Qwen Code, Gemini CLI
    frozenset(
        ("grep_search", "read_file")
    ),  # Qwen Code that fetches other tools when it wants them
)

_DIRECTORY = r"(?:~?/|[A-Za-z]:[\\/])[^\n`<>]{1,1000}"
_LABEL = r"[^\W\d][\w' -]{0,60}"
_FIELD = rf"[ \t]*{_LABEL}:[ \t][^\n<>]{{1,300}}"

_ELEMENT = re.compile(
    rf"(?m)^[ \t]*<(?P<name>\w{{2,20}})>\n"
    rf"(?:{_FIELD}\n|[ \t]*{_DIRECTORY}\n|[ \t]*\n){{1,30}}[ \t]*</(?P=name)>[ \t]*$"
)
_FENCED_STATUS = re.compile(
    r"(?m)^```\w{0,10}\n(?P<word>\w{2,20}):[^\n]*\n(?:(?P=word):[^\n]*\n){0,300}?"
    r"(?P=word): \w{7,40} [^\n]*\n(?:(?P=word):[^\n]*\n){0,100}```$"
)
_LIST = re.compile(
    rf"(?m)^[ \t]*[-*] {_LABEL}: {_DIRECTORY}"
    rf"(?:\n[ \t]*[-*] (?:{_LABEL}: [^\n]{{1,120}}|{_DIRECTORY})$)*"
)
_DIRECTORY_FIELD = re.compile(rf"(?m)^[ \t]*(?:(?:[-*] )?{_LABEL}: )?(?P<directory>{_DIRECTORY})$")
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
_SECTION = re.compile(rf"(?m)^#{{1,4}} (?P<path>{_DIRECTORY})$")
_MOST_SECTION_CHARS = 16_000
_MOST_MENTION_CHARS = 1200
_OBJECT_AT_END = re.compile(r"(?m)^(?:```\w{0,10}\n)?(?P<object>\{[^`]*\})(?:\n```)?\s*\Z")
_MOST_METADATA_CHARS = 4000
_ID_KEY = re.compile(r'"(?:\w{0,40}_)?id"\s*:')
_MOST_MENTIONS = 8
_MOST_BLOCKS = 16
_MOST_TAIL_LINES = 16


class Unblocked(NamedTuple):
    """A system prompt's texts without their blocks, and the blocks in their order."""

    texts: list[str]
    blocks: list[str]


def is_agent(tools: Collection[str]) -> bool:
    """Whether a request with tools of these names is a coding agent's whose blocks are known."""
    return any(agent.issubset(tools) for agent in _AGENTS)


def take_blocks(texts: Sequence[str]) -> Unblocked:
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
    return (
        Unblocked(kept, blocks)
        if any(text.strip() for text in kept)
        else Unblocked(list(texts), [])
    )


def metadata_start(text: str) -> int:
    """Where a JSON object that ends the text begins, if it tells an id or a time; 0: nowhere.

    Agents for messengers end a system prompt with one, new with each message: ids, clocks, counts.
    """
    end = len(text.rstrip())
    match = _OBJECT_AT_END.search(text, max(end - _MOST_METADATA_CHARS, 0), end)
    if not match:
        return 0
    try:
        value = json.loads(match["object"])
    except (ValueError, RecursionError):
        return 0
    if not isinstance(value, dict):
        return 0
    kinds = {found.kind for found in find_volatile(match["object"])}
    changes = kinds & {"id", "time"} or _ID_KEY.search(match["object"])
    return match.start() if changes else 0


def _without_forms(text: str) -> tuple[str, list[str]]:
    """Forms 1 to 4; a text's end is looked at again behind each that was taken from it."""
    at_end: list[str] = []
    whole = text
    while cut := _status(text) or _tail(text) or _section(text):
        at_end.insert(0, text[cut:].strip("\n"))
        text = text[:cut].rstrip("\n")
        if len(at_end) > _MOST_BLOCKS:
            return whole, []
    inside: list[str] = []
    for form in (_FENCED_STATUS, _ELEMENT, _LIST):
        matches = list(islice(form.finditer(text), _MOST_BLOCKS + 1))
        if len(matches) > _MOST_BLOCKS:
            continue  # a document of many such things, not an agent's own
        spans = []
        fences = _fences(text)
        for match in matches:
            start, end = match.span()
            if _is_fenced(fences, start) or not _tells_a_place(form, match[0]):
                continue
            if form is not _LIST:
                start = _with_heading(text, start, is_any=form is _FENCED_STATUS)
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


def _tells_a_place(form: re.Pattern[str], block: str) -> bool:
    """Whether somebody works there. A list of nothing but directories tells where things lie."""
    lines = block.split("\n")
    count = sum(bool(_DIRECTORY_FIELD.match(line)) for line in lines)
    if form is _LIST:
        return count < len(lines)
    return count > 0 or form is _FENCED_STATUS


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
    """Where the dates and directories that end the text begin; 0: it ends otherwise.

    Many such lines are a table.
    """
    end = len(text.rstrip("\n"))
    start = end
    for _ in range(_MOST_TAIL_LINES):
        before = text.rfind("\n", 0, max(start - 1, 0)) + 1
        match = _LABELLED.match(text[before:start].rstrip("\n"))
        if not match or not _changes(match["value"]):
            return start if start < end else 0
        if before == 0:
            return 0  # nothing would be left
        start = before
    return 0


def _section(text: str) -> int:
    """Where the last section begins, if its heading is a file of a directory's own; 0: it isn't."""
    fences = _fences(text)
    for match in _SECTION.finditer(text, max(len(text) - _MOST_SECTION_CHARS, 0)):
        if _NAMED_AFTER_DIRECTORY.search(match["path"]) and not _is_fenced(fences, match.start()):
            return match.start()
    return 0


def _changes(value: str) -> bool:
    kinds = {found.kind for found in find_volatile(f"Now: {value}")}
    return bool(_IS_DIRECTORY.match(value)) or bool(kinds & {"date", "time"})


def _with_heading(text: str, start: int, *, is_any: bool) -> int:
    """A block's start with the line before it where that announces the block, or any words."""
    before = text.rfind("\n", 0, max(start - 1, 0)) + 1
    line = text[before:start].rstrip()
    return before if line.endswith(":") or (is_any and line) else start


def _fences(text: str) -> list[int]:
    """Where fences of listings begin and end, in their order."""
    return [match.start() for match in re.finditer(r"(?m)^[ \t]*```", text)]


def _is_fenced(fences: Sequence[int], place: int) -> bool:
    return bisect_left(fences, place) % 2 == 1


def _mentions(text: str, directories: Collection[str]) -> list[tuple[int, int]]:
    """Sentences with a path in backquotes that is a directory's own, as places in the text."""
    names = {*directories, *(re.sub(r"[^A-Za-z0-9]", "-", one) for one in directories)}
    found: list[tuple[int, int]] = []
    fences = _fences(text)
    for match in _QUOTED_PATH.finditer(text):
        path = match[1]
        if not (_NAMED_AFTER_DIRECTORY.search(path) or any(name in path for name in names)):
            continue
        start, end = _sentence(text, *match.span())
        is_new = not found or start >= found[-1][1]
        if is_new and end - start <= _MOST_MENTION_CHARS and not _is_fenced(fences, start):
            found.append((start, end))
            if len(found) > _MOST_MENTIONS:
                break
    return found


def _sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentence around a place, with the blank behind it; a line's end ends a sentence."""
    line = text.rfind("\n", 0, start) + 1
    before = text.rfind(". ", line, start)
    ends = [place for place in (text.find(". ", end), text.find("\n", end)) if place >= 0]
    last = min(ends, default=len(text))
    return (before + 2 if before >= 0 else line), last + 2 if text[last : last + 1] == "." else last
