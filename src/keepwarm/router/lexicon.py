"""The router's word lists, read once from `lexicon.toml` beside this module."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from keepwarm.errors import ConfigError

Lists = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Function words and named lists; `lexicon.toml` says what each is for."""

    stop: frozenset[str]
    foreign: frozenset[str]
    tool_stop: frozenset[str]
    asking: frozenset[str]
    polite: frozenset[str]
    projects: frozenset[str]
    verb_classes: Lists
    cues: Lists
    foreign_cues: Lists
    concepts: Lists
    slot_words: Lists
    value_words: Lists


@cache
def lexicon() -> Lexicon:
    """The packaged lists.

    Raises:
        ConfigError: the package is damaged.
    """
    packaged = resources.files("keepwarm.router").joinpath("lexicon.toml")
    try:
        raw = tomllib.loads(packaged.read_text(encoding="utf-8"))
        plain = {name: frozenset(listed.split()) for name, listed in raw["words"].items()}
        words, phrases = (str.split, _phrases)
        return Lexicon(
            **plain,
            verb_classes={name: tuple(words(s)) for name, s in raw["verb_classes"].items()},
            cues={name: phrases(s) for name, s in raw["cues"].items()},
            foreign_cues={name: phrases(s) for name, s in raw["foreign_cues"].items()},
            concepts={name: tuple(words(s)) for name, s in raw["concepts"].items()},
            slot_words={name: tuple(words(s)) for name, s in raw["slot_words"].items()},
            value_words={name: tuple(words(s)) for name, s in raw["value_words"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The packaged word lists can't be read ({error!r}). Install Keepwarm again."
        ) from error


def _phrases(listed: str) -> tuple[str, ...]:
    """Phrases between bars; a line's end is a blank."""
    return tuple(" ".join(phrase.split()) for phrase in listed.split("|"))
