"""Units are changed in place: one setting, one word, nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.service.unitfile import (
    argument,
    command_line,
    quoted,
    seal_state,
    sealed,
    values,
    with_added,
    with_value,
    with_words,
)

UNIT = """\
# A comment with Key=value and a path /a/b.
[Unit]
Description=Something

[Service]
ExecStart=/a/b serve \\
# why this option
    --port 8090 \\
    --model /m/x.gguf
SystemCallFilter=@one
SystemCallFilter=~@two
Restart=no
"""


def test_a_continued_setting_is_replaced_whole() -> None:
    changed = with_value(UNIT, "ExecStart", "/c")
    assert values(changed, "ExecStart") == ["/c"]
    assert "--model" not in changed
    assert "why this option" not in changed
    assert values(changed, "Restart") == ["no"]


def test_comments_between_continued_lines_are_not_part_of_the_value() -> None:
    assert values(UNIT, "ExecStart") == ["/a/b serve --port 8090 --model /m/x.gguf"]


def test_a_setting_that_is_missing_or_there_twice_is_refused() -> None:
    with pytest.raises(KeyError, match="Nice occurs 0 times"):
        with_value(UNIT, "Nice", "1")
    with pytest.raises(KeyError, match="SystemCallFilter occurs 2 times"):
        with_value(UNIT, "SystemCallFilter", "x")


def test_a_setting_is_added_behind_the_last_of_its_name() -> None:
    changed = with_added(UNIT, "SystemCallFilter", "Nice=1")
    assert "SystemCallFilter=~@two\nNice=1\nRestart=no" in changed


def test_words_are_replaced_outside_comments_only() -> None:
    changed = with_words(UNIT, {"/a/b": "/q", "8090": "9"})
    assert values(changed, "ExecStart") == ["/q serve --port 9 --model /m/x.gguf"]
    assert changed.startswith("# A comment with Key=value and a path /a/b.")


def test_a_part_of_a_word_is_not_replaced() -> None:
    with pytest.raises(KeyError, match="/m/x"):
        with_words(UNIT, {"/m/x": "/n"})


def test_a_replacement_is_not_replaced_again() -> None:
    changed = with_words(UNIT, {"/a/b": "8090", "8090": "/a/b"})
    assert values(changed, "ExecStart") == ["8090 serve --port /a/b --model /m/x.gguf"]


def test_plain_words_stay_as_they_are_and_specifiers_do_not() -> None:
    assert quoted("/srv/models/a-b_c.gguf") == "/srv/models/a-b_c.gguf"
    assert quoted("50% $HOME") == '"50%% $HOME"'
    assert argument("50% $HOME") == '"50%% $$HOME"'
    assert quoted("") == '""'
    assert command_line(["/a b", "$x", 'say "so"']) == '"/a b" "$$x" "say \\"so\\""'


def _read_as_systemd(line: str) -> list[str]:
    """The words of an Exec line by the rules of systemd.syntax(7), for what `quoted` writes."""
    words = []
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"|(\S+)', line):
        text = match[1] if match[1] is not None else match[2]
        text = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text)
        words.append(text.replace("%%", "%").replace("$$", "$"))
    return words


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), min_size=1))
def test_any_words_come_back_as_they_went_in(words: list[str]) -> None:
    line = command_line(["/bin/true", *words])
    assert "\n" not in line
    assert _read_as_systemd(line)[1:] == words


def test_a_sealed_unit_is_intact_until_any_line_of_it_changes() -> None:
    text = sealed(UNIT)
    assert seal_state(text) == "intact"
    assert seal_state(UNIT) == "foreign"
    assert seal_state(text.replace("Restart=no", "Restart=always")) == "changed"
    assert seal_state(text + "Nice=1\n") == "changed"
