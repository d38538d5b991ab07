"""What a model's deployment learns while it runs, and hands on to the next one of that model."""

from __future__ import annotations

from dataclasses import dataclass

from keepwarm.core.rates import Rates
from keepwarm.engine.beginning import Beginning
from keepwarm.tiers.router_files import load_router
from keepwarm.tiers.routing import TierRouter


@dataclass(frozen=True, slots=True)
class Learned:
    """What things cost, and which tier a conversation has had."""

    rates: Rates
    router: TierRouter


def nothing_learned(beginning: Beginning, *, untiered: str) -> Learned:
    """For a first deployment.

    Raises:
        ConfigError: the router's rules can't be used.
    """
    tiers = beginning.tiers
    rules = load_router(tiers_dir=beginning.tiers_dir, own_tools=list(tiers)[-1].tools)
    return Learned(Rates(), TierRouter(tiers, rules, untiered=untiered))
