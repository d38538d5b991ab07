"""Routing rules of a deployment: `routing.toml`, decoded, to the router's settings.

The form is documented in the file itself (`configs/prompt-tiers/routing.toml`) and docs/router.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from keepwarm.errors import ConfigError
from keepwarm.router.types import (
    FULL,
    MINIMAL,
    STANDARD,
    TIERS,
    DeploymentRule,
    MissCosts,
    TierCost,
)
from keepwarm.router.words import words

#: What the tiers cost when nobody has measured: all of them warm, a small model (135M) on two
#: cores, the medians of docs/benchmark.md; what is displaced is restored at 2 GB/s.
DEFAULT_COSTS: Final = (
    TierCost(MINIMAL, first_s=0.05, token_s=0.016, displaced_s=0.003),
    TierCost(STANDARD, first_s=0.14, token_s=0.022, displaced_s=0.024),
    TierCost(FULL, first_s=0.22, token_s=0.032, displaced_s=0.042),
)

_RULE_KEYS: Final = frozenset(
    ("name", "tier", "any", "all", "none", "min_words", "max_words", "floor")
)
_TOP_KEYS: Final = frozenset(("costs", "rule", "unsure_tier"))


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What a deployment says about routing. `unsure_tier` takes what the scores can't tell."""

    costs: MissCosts = field(default_factory=MissCosts)
    rules: tuple[DeploymentRule, ...] = ()
    unsure_tier: str = STANDARD


def _phrases(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(each, str) for each in raw):
        raise ConfigError(f"{where} must be a list of words or phrases.")
    found = []
    for each in raw:
        open_end = each.rstrip().endswith("*")
        plain = " ".join(words(each))
        if not plain:
            raise ConfigError(f"{where} holds {each!r}, which has no word in it.")
        found.append(plain + "*" if open_end else plain)
    return tuple(found)


def _count(raw: Any, where: str) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 0:
        raise ConfigError(f"{where} must be a whole number of words, 0 or more.")
    return raw


def _rule(raw: Any, at: int) -> DeploymentRule:
    where = f"routing.toml: rule {at}"
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be a table.")
    if unknown := sorted(set(raw) - _RULE_KEYS):
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}.")
    if raw.get("tier") not in TIERS:
        raise ConfigError(f"{where}: tier must be one of {', '.join(TIERS)}.")
    rule = DeploymentRule(
        name=str(raw.get("name", f"rule {at}")),
        tier=raw["tier"],
        any_of=_phrases(raw.get("any", []), f"{where}: any"),
        all_of=_phrases(raw.get("all", []), f"{where}: all"),
        none_of=_phrases(raw.get("none", []), f"{where}: none"),
        min_words=_count(raw.get("min_words", 0), f"{where}: min_words"),
        max_words=_count(raw["max_words"], f"{where}: max_words") if "max_words" in raw else None,
        is_floor=bool(raw.get("floor", True)),
    )
    if not (rule.any_of or rule.all_of or rule.min_words or rule.max_words is not None):
        raise ConfigError(f"{where} would hold for every request: give any, all or a word count.")
    return rule


def config_from_toml(data: Mapping[str, Any]) -> RouterConfig:
    """A decoded routing.toml.

    Raises:
        ConfigError: a key or value that isn't understood; nothing is half applied.
    """
    if unknown := sorted(set(data) - _TOP_KEYS):
        raise ConfigError(f"routing.toml has unknown keys: {', '.join(unknown)}.")
    raw_costs = data.get("costs", {})
    known = {each.name for each in fields(MissCosts)}
    if isinstance(raw_costs, Mapping) and "step_s" in raw_costs:
        raise ConfigError(
            "routing.toml: costs.step_s is no more; remove it. What a larger prompt costs is"
            " measured now, and what it spoils is costs.spoiled."
        )
    if not isinstance(raw_costs, Mapping) or (unknown := sorted(set(raw_costs) - known)):
        raise ConfigError(f"routing.toml: [costs] may hold {', '.join(sorted(known))}.")
    for name, value in raw_costs.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ConfigError(f"routing.toml: costs.{name} must be a number, 0 or more.")
        if not name.endswith("_s") and value > 1:
            raise ConfigError(f"routing.toml: costs.{name} is a share, from 0 to 1.")
    unsure = data.get("unsure_tier", STANDARD)
    if unsure not in TIERS:
        raise ConfigError(f"routing.toml: unsure_tier must be one of {', '.join(TIERS)}.")
    raw_rules = data.get("rule", [])
    if not isinstance(raw_rules, list):
        raise ConfigError("routing.toml: rules are written as [[rule]].")
    return RouterConfig(
        costs=MissCosts(**{name: float(value) for name, value in raw_costs.items()}),
        rules=tuple(_rule(raw, at) for at, raw in enumerate(raw_rules, 1)),
        unsure_tier=unsure,
    )
