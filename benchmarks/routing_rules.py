"""By which rules the answers to the routing benchmark's tasks are judged: one a task, in order.

A task for *minimal* is answered right if the reply is text, calls no tool, and holds what is asked
for: each of some regular expressions (a number, a name, so many words). A task for *standard* or
*full* is begun right if the first tool called is one that the task can begin with. A call that is
written out as text counts too: small models forget the marks around it, and every arm is judged
alike. The rules know nothing of style, and can be met by a poor answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.routing_tasks import FULL, MINIMAL, STANDARD

_WRITTEN_CALL = re.compile(
    r"\s*(?:```\w*\s*)?\{\s*\"name\"\s*:\s*\"([^\"]+)\"\s*,\s*\"(?:arguments|parameters)\""
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a right answer has: `says`, all of them, and no call; or a first call of `calls`."""

    says: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    def is_met(self, text: str, calls: Sequence[str]) -> bool:
        """Whether an answer of this text and these tools' names is right."""
        if written := _WRITTEN_CALL.match(text):
            calls = [*calls, written[1]]
        if self.calls:
            return bool(calls) and calls[0] in self.calls
        if calls or text.lstrip(" *`\"'").upper().startswith("NEED_MORE"):
            return False
        return all(re.search(each, text, re.IGNORECASE | re.DOTALL) for each in self.says)


def _says(*patterns: str) -> Rule:
    return Rule(says=patterns)


def _calls(names: str) -> Rule:
    return Rule(calls=tuple(names.split()))


_FOR_MINIMAL = (
    _says(r"Ula+n ?baa?tar"),
    _says(r"buen[oa]s d[ií]as", r"vecin[oa]"),
    _says(r"invoice", r"please|could you|would you|kindly|appreciate"),
    _says(r"obstinate|headstrong|inflexible|unyielding|tenacious|persistent|adamant|determined"),
    _says(r"2[, ]?160"),
    _says(r"mammal"),
    _says(r"octopuses|octopi|octopodes"),
    _says(r"nitrogen", r"oxygen", r"argon|carbon dioxide|CO2"),
    _says(r"plant|lea(f|ves)", r"sun|light"),
    _says(r"water is heavier|heavier[^.]*\bwater|water[^.]*(heavier|denser|more dense)"),
    _says(r"\w+\W+\w+\W+\w+.*\n.*\w+.*\n", r"rain|drop|drip|puddle|wet"),
    _says(r"he and I were|he and I.*late|we were late"),
    _says(r"\w+", r"light|keeper|lamp|sea|shore|beacon|tide"),
    _says(r"Shakespeare"),
    _says(r"night|welcome|bye|glad"),
    _says(r"\b20\b"),
    _says(r"dens|lighter|expan"),
    _says(r"price|purchasing power|cost"),
    _says(r"\b(two|2)\b.{0,20}\bm|\bm'?s\b|double m|\bmm\b"),
    _says(r"penguin"),
    _says(r"\b90\b"),
    _says(r"luck|chance|accident|fortun|unexpected|unplanned"),
    _says(r"Jupiter.*Earth.*Mars.*Mercury|Mercury.*Mars.*Earth.*Jupiter"),
    _says(r"spoon"),
)

_FOR_STANDARD = (
    _calls("read_file"),
    _calls("web_search fetch_page"),
    _calls("run_command list_files"),
    _calls("list_files run_command"),
    _calls("edit_file read_file run_command"),
    _calls("schedule_task current_time"),
    _calls("web_search fetch_page current_time"),
    _calls("current_time"),
    _calls("write_file run_command"),
    _calls("search_files run_command list_files"),
    _calls("run_command"),
    _calls("remember"),
    _calls("fetch_page"),
    _calls("edit_file read_file run_command write_file"),
    _calls("run_command list_files search_files"),
    _calls("run_command list_files ask_owner"),
    _calls("schedule_task current_time"),
    _calls("run_command ask_owner"),
    _calls("run_command read_file"),
    _calls("read_file run_command"),
    _calls("web_search current_time fetch_page"),
    _calls("run_command"),
    _calls("read_file run_command"),
    _calls("search_files run_command"),
)

_FOR_FULL = (
    _calls("search_files list_files run_command read_file recall"),
    _calls("recall read_file list_files search_files"),
    _calls("list_files read_file run_command search_files"),
    _calls("list_files read_file search_files run_command recall"),
    _calls("recall search_files list_files read_file"),
    _calls("list_files run_command search_files recall"),
    _calls("recall read_file list_files search_files"),
    _calls("read_file run_command list_files search_files recall"),
    _calls("schedule_task recall current_time"),
    _calls("read_file recall list_files search_files"),
    _calls("run_command read_file web_search recall ask_owner"),
    _calls("recall"),
    _calls("search_files run_command list_files"),
    _calls("read_file list_files search_files recall run_command"),
    _calls("recall list_files read_file"),
    _calls("read_file list_files search_files run_command recall write_file"),
    _calls("recall list_files read_file search_files"),
    _calls("run_command read_file list_files search_files web_search recall fetch_page"),
    _calls("recall list_files read_file search_files"),
    _calls("recall web_search"),
    _calls("list_files run_command recall"),
    _calls("recall read_file list_files"),
    _calls("list_files run_command search_files read_file"),
    _calls("recall list_files read_file search_files"),
)

#: By a task's text.
RULES: dict[str, Rule] = dict(
    zip(
        (*MINIMAL, *STANDARD, *FULL),
        (*_FOR_MINIMAL, *_FOR_STANDARD, *_FOR_FULL),
        strict=True,
    )
)
