"""From a request to its tier: explicit, routed, or left alone.

The router itself is pure (`keepwarm.router`); here it gets what only a running deployment knows:
the tiers' own tools, what each tier would cost at this moment, and which tier a conversation has
had.
"""

from __future__ import annotations

import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.core.prompt import Api, prompt_of, segments_of
from keepwarm.core.tiers import Tier, TierSet
from keepwarm.errors import ConfigError, RequestError
from keepwarm.gateway.tiering import AUTO, Tiered, apply_tier, asked_tier, has_own_system
from keepwarm.router import (
    Catalog,
    CatalogCache,
    Decision,
    Escalation,
    RouterConfig,
    TierCost,
    Weights,
    config_from_toml,
    route,
    route_request,
    tool_texts,
    weights_from_json,
)

# Conversations whose tier is remembered; 16 bytes and a name each.
_REMEMBERED = 10_000


def load_weights() -> Weights:
    """The weights that came with Keepwarm."""
    raw = files("keepwarm.router").joinpath("weights.json").read_bytes()
    return weights_from_json(msgspec.json.decode(raw))


def load_router_config(tiers_dir: Path) -> RouterConfig:
    """The deployment's `routing.toml` beside its tiers; the usual settings without one.

    Raises:
        ConfigError: it can't be read or understood.
    """
    path = tiers_dir / "routing.toml"
    if not path.is_file():
        return RouterConfig()
    try:
        return config_from_toml(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} isn't valid TOML: {error}.") from error


class TierRouter:
    """Decides tiers for one deployment. `costs` tells what each tier would cost now, in seconds."""

    def __init__(
        self,
        tiers: TierSet,
        config: RouterConfig,
        weights: Weights,
        *,
        costs: Callable[[], Sequence[TierCost]],
        untiered: str,
    ) -> None:
        self._tiers = tiers
        self._config = config
        self._weights = weights
        self._costs = costs
        self._untiered = untiered
        self._catalogs = CatalogCache(weights.words)
        self._conversations: OrderedDict[bytes, str] = OrderedDict()
        largest = list(tiers)[-1]
        self._own_tools = tool_texts(largest.tools) or ()

    def tier(self, api: Api, body: dict[str, Any], header: str | None, namespace: str) -> Tiered:
        """The request with its tier in it.

        An explicit tier wins; a request with a system prompt of its own and no tier asked for is
        left alone.

        Raises:
            RequestError: the header names an unknown tier, or an explicit tier and the client's
                tools can't be joined.
        """
        asked = asked_tier(api, body, header, self._tiers)
        if asked and asked != AUTO:
            return apply_tier(api, body, self._named(asked), "explicit")
        own = has_own_system(api, body)
        if not asked and (self._untiered == "pass" or own or api == "completion"):
            return Tiered(body, None, "own-prompt" if own else "untiered")
        conversation = self._conversation(api, body, namespace)
        decision = self.decide(api, body, tier_so_far=self._tier_so_far(conversation))
        tier = self._tiers.get(decision.tier) or self._tiers.default
        try:
            tiered = apply_tier(api, body, tier, decision.reason.value)
        except RequestError:
            # The client defines one of the tier's tools otherwise; its own tools are what it
            # wants, so the tier without any goes with them.
            tier = next(iter(self._tiers))
            tiered = apply_tier(api, body, tier, "client-tools")
        self._remember(conversation, tier.name)
        return tiered

    def decide(
        self, api: Api, body: Mapping[str, Any], *, tier_so_far: str | None = None
    ) -> Decision:
        """The router's decision for a body, with its reasons."""
        if api == "responses":
            messages = [{"role": s.role, "content": s.text} for s in segments_of(api, body)]
            body = {**body, "messages": messages}
        request = route_request(body, tier_so_far=tier_so_far)
        return route(
            request, self.catalog(request.tools), self._costs(), self._config, self._weights
        )

    def catalog(self, tools: Sequence[Any] | None) -> Catalog:
        """The tools on offer: the client's, else the tiers' own."""
        if tools:
            return self._catalogs.get(tools)
        return self._catalogs.get(self._own_tools, is_open=True)

    def escalated(
        self, api: Api, body: dict[str, Any], now: Tiered, escalation: Escalation, namespace: str
    ) -> Tiered | None:
        """The request one tier up, None if there is none."""
        assert now.tier
        up = self._tiers.next_up(now.tier.name)
        if up is None:
            return None
        self._remember(self._conversation(api, body, namespace), up.name)
        reason = f"escalated from {now.tier.name}: {escalation.cause.value}"
        return apply_tier(api, body, up, reason)

    def _named(self, name: str) -> Tier:
        tier = self._tiers.get(name)
        assert tier is not None
        return tier

    def _conversation(self, api: Api, body: Mapping[str, Any], namespace: str) -> list[bytes]:
        """Digests of the conversation so far, the longest last."""
        prompt = prompt_of(api, body, fingerprint="conversation", namespace=namespace)
        return [mark.digest for mark in prompt.marks[1:]]

    def _tier_so_far(self, conversation: list[bytes]) -> str | None:
        """The tier an earlier turn of this conversation had: it never goes down again."""
        # Not the last: that is this very request, perhaps sent before.
        for digest in reversed(conversation[:-1]):
            if known := self._conversations.get(digest):
                return known
        return None

    def _remember(self, conversation: list[bytes], tier: str) -> None:
        if not conversation:
            return
        self._conversations[conversation[-1]] = tier
        self._conversations.move_to_end(conversation[-1])
        if len(self._conversations) > _REMEMBERED:
            self._conversations.popitem(last=False)
