"""Find what changes in texts that should stay the same.

One date near the top of a prompt undoes every cached token below it. These patterns look for the
usual culprits and are narrow on purpose: a warning about what never changes teaches people to
ignore warnings. Each pattern is linear in the text, since clients' prompts are looked at as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Volatile", "find_volatile"]

_EXCERPT_CHARS = 60


@dataclass(frozen=True, slots=True, order=True)
class Volatile:
    """A place in a text that probably differs tomorrow, elsewhere or in the next run.

    `line` and `column` count from 1, in characters. `kind` is one of `date`, `time`, `path`, `id`,
    `host`, `ip`, `pid`.
    """

    line: int
    column: int
    kind: str
    excerpt: str


_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_WEEKDAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?"
_ZONE = r"(?:Z\b|\s?[+-]\d\d:?\d\d|\s(?:UTC|GMT|CES?T|E[SD]T|P[SD]T)\b)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"

# A match of an earlier pattern hides those of later ones inside it.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "id",
        re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"),
    ),
    # 32 and more: digests. From 16 a digit and a letter are asked for: "effaced" or 10**16 are not.
    (
        "id",
        re.compile(
            r"\b(?:0x)?(?:[0-9a-fA-F]{32,}"
            r"|(?=[0-9]{0,63}[a-fA-F])(?=[a-fA-F]{0,63}[0-9])[0-9a-fA-F]{16,31})\b"
        ),
    ),
    ("id", re.compile(r"\bcommit\s+[0-9a-f]{7,15}\b")),
    # Ids as services write them: req_8f3kQ2mZ. A digit is asked for: session_identifier is a word.
    (
        "id",
        re.compile(
            r"\b(?:req|sess|session|run|chat|conv|call|trace|thread|msg|task)[_-]"
            r"(?=[A-Za-z]{0,40}\d)[0-9A-Za-z]{8,40}\b"
        ),
    ),
    (
        "date",
        re.compile(
            r"(?<![\w./-])(?:19|20)\d\d([-/.])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
            rf"(?:[T ]{_CLOCK}{_ZONE}?|(?![\w-]))"
        ),
    ),
    (
        "date",
        re.compile(
            r"(?<![\w./-])(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)\d\d(?![\w-])"
        ),
    ),
    (
        "date",
        re.compile(
            rf"(?:\b{_WEEKDAY},?\s+)?\b(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\.?\s+(?:of\s+)?"
            rf"{_MONTH}\b\.?(?:,?\s+(?:19|20)\d\d\b)?"
        ),
    ),
    (
        "date",
        re.compile(
            rf"(?:\b{_WEEKDAY},?\s+)?\b{_MONTH}\b\.?\s+(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
            r"(?![\w:%])(?:,?\s+(?:19|20)\d\d\b)?"
        ),
    ),
    # A weekday or a month alone is a date only where the sentence says that it is now.
    (
        "date",
        re.compile(
            rf"(?i:\b(?:today|now|current(?:\s+date)?|date)(?:\s+is|:)?\s+)"
            rf"(?:{_WEEKDAY}|{_MONTH}\s+(?:19|20)\d\d)\b"
        ),
    ),
    # Not file.py:12:30, not a ratio.
    ("time", re.compile(rf"(?<![\w:./]){_CLOCK}(?![\w:]){_ZONE}?")),
    (
        "time",
        re.compile(
            r"(?<![\w:./])(?:0?[1-9]|1[0-2])(?::[0-5]\d)?\s?(?:[ap]m|[AP]M|[ap]\.m\.)(?!\w)"
        ),
    ),
    # Seconds or milliseconds since 1970, 2017 to 2033.
    ("time", re.compile(r"(?<![\w.,+-])1[5-9]\d{8}(?:\d{3})?(?![\w.,]\d|\w)")),
    ("pid", re.compile(r"\b(?:PID|pid|process\s+id|Process\s+ID)\s*(?:is\s+|[:=#]\s*)?\d{2,8}\b")),
    (
        "host",
        re.compile(
            r"(?<![\w@./-])[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}\.){1,4}"
            r"(?:local|lan|internal|intranet|localdomain|home\.arpa|corp)\b(?![\w.(-]*\()"
        ),
    ),
    ("host", re.compile(r"(?i:\bhost(?:\s?name)?\s*[:=]\s*)(?!localhost\b)[A-Za-z][\w-]{1,62}\b")),
    # A version number has a letter, a dot or a word for it in front. Loopback never changes.
    (
        "ip",
        re.compile(
            rf"(?<![\w.])(?<!ersion )(?!127\.|0\.0\.0\.0\b)(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\d)"
        ),
    ),
    (
        "ip",
        re.compile(
            r"(?<![\w:.])(?:(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}"
            r"|(?:[0-9a-fA-F]{1,4}:){2,6}:(?:[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4}){0,4})?)(?![\w:])"
        ),
    ),
    # Places that differ between machines, people and runs; /etc, /usr and /dev don't.
    (
        "path",
        re.compile(
            r"(?<![\w./~:<-])/(?:home|Users|root|tmp|var|opt|srv|mnt|media|run|private|Volumes|data"
            r"|work|workspace|workspaces|app|repo|scratch)(?:/[\w.@+~-]{1,255}){1,64}/?"
        ),
    ),
    ("path", re.compile(r"(?<![\w])[A-Za-z]:\\(?:[\w .@+~-]{1,255}\\){0,64}[\w.@+~-]{1,255}")),
    ("path", re.compile(r"\bfile://(?:/[\w.@+~%-]{1,255}){1,64}")),
)


def find_volatile(text: str) -> list[Volatile]:
    """What in `text` changes with the day, the machine or the run, in reading order.

    Loopback addresses, `/usr`, public host names, version numbers and words for times
    ("YYYY-MM-DD", "every Monday") aren't reported.
    """
    taken: list[tuple[int, int, str]] = []
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            start, end = match.span()
            if not any(
                start < other_end and other_start < end for other_start, other_end, _ in taken
            ):
                taken.append((start, end, kind))
    return [_at(text, start, end, kind) for start, end, kind in sorted(taken)]


def _at(text: str, start: int, end: int, kind: str) -> Volatile:
    line_start = text.rfind("\n", 0, start) + 1
    excerpt = " ".join(text[start:end].split())
    if len(excerpt) > _EXCERPT_CHARS:
        excerpt = excerpt[: _EXCERPT_CHARS - 1] + "…"
    return Volatile(text.count("\n", 0, start) + 1, start - line_start + 1, kind, excerpt)
