"""Text of a systemd unit: change single settings and words, leave comments and order alone. Pure.

The units in deploy/systemd/ are complete and work by hand; what is installed is the same text with
a user's own values in it, so there is nothing that could differ. See systemd.syntax(7).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@=+,./-]+")
_SEAL = "# Sealed by `keepwarm service install`: "


def quoted(word: str) -> str:
    """A word for a unit, with all that systemd would take for something else escaped.

    Right for a path in a list, and for the command of an Exec line; its arguments see `argument`.
    Any text without NUL is kept, line breaks too.
    """
    text = word.replace("%", "%%")
    if text and _PLAIN_WORD.fullmatch(text):
        return text
    for plain, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(plain, escape)
    return f'"{text}"'


def argument(word: str) -> str:
    """A word behind the command of an Exec line, where systemd expands variables as well."""
    return quoted(word.replace("$", "$$"))


def command_line(arguments: list[str]) -> str:
    """An Exec line's value: the command and its arguments."""
    first, *rest = arguments
    return " ".join([quoted(first), *(argument(word) for word in rest)])


def with_value(text: str, key: str, value: str) -> str:
    """The unit with a setting changed, continuation lines and all.

    Raises:
        KeyError: the unit has no such setting, or several.
    """
    found = [(first, last) for name, first, last in _settings(text) if name == key]
    if len(found) != 1:
        raise KeyError(f"{key} occurs {len(found)} times in the unit")
    first, last = found[0]
    lines = text.split("\n")
    return "\n".join([*lines[:first], f"{key}={value}", *lines[last + 1 :]])


def with_added(text: str, after: str, setting: str) -> str:
    """The unit with a line `setting` behind the setting named `after`.

    Raises:
        KeyError: the unit has no setting of that name.
    """
    places = [last for name, _, last in _settings(text) if name == after]
    if not places:
        raise KeyError(f"{after} isn't in the unit")
    lines = text.split("\n")
    return "\n".join([*lines[: places[-1] + 1], setting, *lines[places[-1] + 1 :]])


def with_words(text: str, words: Mapping[str, str]) -> str:
    """The unit with whole words replaced wherever they stand outside comments.

    A word ends at a space, a quote, `=`, `:` or a line's end; replacements are not looked at again.

    Raises:
        KeyError: a word isn't there, so the unit and its caller no longer agree.
    """
    missing = set(words)
    pattern = re.compile(
        r"(?<![\w./%-])("
        + "|".join(re.escape(w) for w in sorted(words, key=len)[::-1])
        + r")(?![\w./-])"
    )

    def replace(match: re.Match[str]) -> str:
        missing.discard(match[1])
        return words[match[1]]

    lines = [
        line if line.startswith(("#", ";")) else pattern.sub(replace, line)
        for line in text.split("\n")
    ]
    if missing:
        raise KeyError(f"{sorted(missing)} aren't in the unit")
    return "\n".join(lines)


def values(text: str, key: str) -> list[str]:
    """All values of a setting, continuation lines joined and comments between them left out."""
    lines = text.split("\n")
    out = []
    for name, first, last in _settings(text):
        if name == key:
            block = [line for line in lines[first : last + 1] if not line.startswith(("#", ";"))]
            joined = " ".join(line.removesuffix("\\").strip() for line in block)
            out.append(joined.partition("=")[2].strip())
    return out


def sealed(text: str) -> str:
    """The unit with a last line by which a later change to it is noticed."""
    return f"{text}{_SEAL}{_digest(text)}\n"


def seal_state(text: str) -> str:
    """`intact`: as `sealed` wrote it; `changed` since; `foreign`: never sealed."""
    body, found, digest = text.rpartition(_SEAL)
    if not found:
        return "foreign"
    return "intact" if digest == _digest(body) + "\n" else "changed"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _settings(text: str) -> Iterator[tuple[str, int, int]]:
    """Each setting's name, its first and its last line (both inclusive, from 0)."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        first = at
        at += 1
        if lines[first].startswith(("#", ";", "[")) or "=" not in lines[first]:
            continue
        last = first
        # A comment between continuation lines neither ends nor continues the value.
        while lines[last].endswith("\\"):
            while at < len(lines) and lines[at].startswith(("#", ";")):
                at += 1
            if at == len(lines):
                break
            last, at = at, at + 1
        yield lines[first].partition("=")[0], first, last
