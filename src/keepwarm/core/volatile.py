"""Find what changes in texts that should stay the same.

One date near the top of a prompt undoes every cached token below it. These patterns look for the
usual culprits and are narrow on purpose: a warning about what never changes teaches people to
ignore warnings. So a bare "09:00" is taken for opening hours unless the sentence speaks of now, and
"25 December" for a holiday unless it has a year. Repetitions inside the patterns are bounded, so
that a long prompt of a client costs time in proportion to its length.
"""

from __future__ import annotations

import re
from bisect import bisect_right
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
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_WEEKDAY = r"\b(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b)"
_YEAR = r"(?:19|20)\d\d\b"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_MINUTES = r"(?:[01]?\d|2[0-3]):[0-5]\d"
_SECONDS = r":[0-5]\d(?:[.,]\d{1,9})?"
_ZONE = r"(?:Z\b|\s?[+-]\d\d:?\d\d\b|\s?(?:UTC|GMT|CES?T|[ECMP][SD]T)\b)"
_HALF_DAY = r"\s?(?:[ap]m\b|[AP]M\b|[ap]\.m\.)"
_NOW = r"(?i:\b(?:now|today|time|date|currently|as of|it is|it's|updated|generated|started)\b)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_STEP = r"/[\w.@+~%-]{1,255}"

# A group called `hit` is what is reported, where the pattern needs words around it to be sure.
# What an earlier pattern has found is hidden from the later ones.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        # An id has a digit somewhere; below 32 of them a letter, too: a number isn't an id.
        ("id", r"\b(?=[a-fA-F-]{0,35}\d)[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"),
        (
            "id",
            r"\b(?:0x)?(?:(?=[a-fA-F]{0,255}\d)[0-9a-fA-F]{32,256}"
            r"|(?=[0-9]{0,31}[a-fA-F])(?=[a-fA-F]{0,31}[0-9])[0-9a-fA-F]{16,31})\b",
        ),
        ("id", r"\bcommit\s(?=[a-f]{0,40}\d)[0-9a-f]{7,15}\b"),
        # As services write them: req_8f3kQ2mZ4. Two digits, since call_function1 is a name.
        (
            "id",
            r"\b(?:req|resp|sess|session|run|chat|chatcmpl|conv|call|trace|thread|msg|job)[_-]"
            r"(?=(?:[A-Za-z]{0,40}\d){2})[0-9A-Za-z]{8,40}\b",
        ),
        (
            "date",
            r"(?<![\w./-])(?:19|20)\d\d([-/.])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
            rf"(?:[T ]{_MINUTES}(?:{_SECONDS})?{_ZONE}?|(?![\w-]|[./]\d))",
        ),
        ("date", rf"(?<![\w./-])(?:[0-3]?\d)([-/.])(?:[0-3]?\d)\1{_YEAR}(?![-/]|\.\d)"),
        (
            "date",
            rf"(?:{_WEEKDAY},?\s)?\b{_DAY}\.?\s(?:of\s)?{_MONTH},?\s{_YEAR}"
            rf"|(?:{_WEEKDAY},?\s)?\b{_MONTH}\s{_DAY},?\s{_YEAR}",
        ),
        ("date", rf"{_WEEKDAY},?\s(?:the\s)?(?:{_DAY}\.?\s(?:of\s)?{_MONTH}|{_MONTH}\s{_DAY}\b)"),
        (
            "date",
            rf"{_NOW}[^\n.;]{{0,12}}?(?P<hit>{_WEEKDAY}|\b{_DAY}\.?\s{_MONTH}"
            rf"|\b{_MONTH}\s{_DAY}\b(?!:)|\b{_MONTH},?\s{_YEAR})",
        ),
        ("time", rf"(?<![\w:./]){_MINUTES}(?:{_SECONDS}(?![\w:]){_ZONE}?|{_ZONE})"),
        # [14:05] as in a log, or a sentence that says that it is now.
        ("time", rf"(?m:^)\s{{0,8}}\[(?P<hit>{_MINUTES})\]"),
        (
            "time",
            rf"{_NOW}[^\n.;]{{0,24}}?(?<![\w:./])"
            rf"(?P<hit>{_MINUTES}(?![\w:])(?:{_HALF_DAY})?|(?:1[0-2]|[1-9]){_HALF_DAY})",
        ),
        # Seconds or milliseconds since 1970, for the years 2017 to 2033.
        ("time", r"(?<![\w.,+/-])1[5-9]\d{8}(?:\d{3}(?:\d{3})?)?(?!\w|[.,]\d{3})"),
        ("pid", r"(?i:\b(?:pid|process[\s_-]id)\b\W{0,4}(?:is\s)?)(?P<hit>\d{2,8})\b"),
        (
            "host",
            r"(?<![\w@./-])(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,4}"
            r"(?:local|lan|internal|intranet|localdomain|corp|home\.arpa)(?![\w(-]|\.\w)",
        ),
        (
            "host",
            r"(?i:\bhost\s?name\b(?:\s?[:=]\s?|\sis\s))(?!localhost\b)(?P<hit>[A-Za-z][\w-]{1,62})\b",
        ),
        # A version has a letter, a dot or the word in front. Loopback is the same everywhere.
        (
            "ip",
            r"(?<![\w.-])(?<!ersion )(?!127\.|0\.0\.0\.0\b|255\.255\.)"
            rf"(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d|-\d)",
        ),
        (
            "ip",
            r"(?<![\w:.])(?:(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}"
            r"|(?=[0-9a-fA-F:]{0,40}\d)(?:[0-9a-fA-F]{1,4}:){1,6}"
            r"(?::[0-9a-fA-F]{1,4}){1,6})(?![\w:])",
        ),
        # Places that differ between machines, people and runs; /etc, /usr, /bin and /dev don't.
        (
            "path",
            r"(?<![\w./~:<-])/(?:home|Users|root|tmp|var|opt|srv|mnt|media|run|private|Volumes"
            rf"|data|app|workspaces?|scratch)(?:{_STEP}){{1,64}}/?(?<!\.)",
        ),
        # Any other root where the words say that a place is meant, so not /v1/models.
        (
            "path",
            r"(?i:\b(?:directory|folder|cwd|workdir|path|pwd|checkout|repository|project)\b)"
            r"(?:\sis)?\W{1,4}"
            rf"(?<![\w.~/])(?P<hit>/(?!v\d|api/|etc/|usr/|dev/|bin/|proc/)[\w.@+~%-]{{1,255}}"
            rf"(?:{_STEP}){{1,64}}/?(?<!\.))",
        ),
        ("path", r"(?<!\w)[A-Za-z]:\\(?:[\w.@+~-]{1,255}\\){0,64}[\w.@+~-]{1,255}"),
        ("path", rf"\bfile://(?:{_STEP}){{1,64}}"),
    )
)


def find_volatile(text: str) -> list[Volatile]:
    """What in `text` changes with the day, the machine or the run, in reading order.

    Not reported are loopback addresses, `/etc` and `/usr`, public host names, version numbers,
    hours of a timetable, and words for times ("YYYY-MM-DD", "every Monday").
    """
    spans: list[tuple[int, int, str]] = []
    rest = text
    for kind, pattern in _PATTERNS:
        found = [_span(match) for match in pattern.finditer(rest)]
        spans += [(start, end, kind) for start, end in found]
        rest = _hide(rest, found)
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    result = []
    for start, end, kind in sorted(spans):
        line = bisect_right(line_starts, start)
        column = start - line_starts[line - 1] + 1
        result.append(Volatile(line, column, kind, _excerpt(text[start:end])))
    return result


def _span(match: re.Match[str]) -> tuple[int, int]:
    return match.span("hit" if "hit" in match.re.groupindex else 0)


def _hide(text: str, spans: list[tuple[int, int]]) -> str:
    """`text` with the spans (in order, disjoint) blanked by a character that no pattern matches."""
    if not spans:
        return text
    pieces = []
    done = 0
    for start, end in spans:
        pieces += [text[done:start], "\0" * (end - start)]
        done = end
    return "".join([*pieces, text[done:]])


def _excerpt(found: str) -> str:
    line = " ".join(found.split())
    return line if len(line) <= _EXCERPT_CHARS else line[: _EXCERPT_CHARS - 1] + "…"
