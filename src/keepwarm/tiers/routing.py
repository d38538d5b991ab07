"""From a request to its tier: explicit, routed, or left alone.

The router itself is pure (`keepwarm.router`); here it gets what only a running deployment knows:
the tiers' own tools, what each tier would cost at this moment, and which tier a conversation has
had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from keepwarm.api.reading import Api, read
from keepwarm.core.prompt import is_raw, prompt_of
from keepwarm.core.reply import Reply
from keepwarm.core.tiers import Tier, TierSet
from keepwarm.errors import RequestError
from keepwarm.router import (
    Decision,
    Escalation,
    TierCost,
    route_request,
)
from keepwarm.router.replies import ReplyLengths
from keepwarm.tiers.router_files import Router
from keepwarm.tiers.tiering import (
    AUTO,
    TieredRequest,
    apply_tier,
    asked_tier,
    has_own_system,
    shaping,
)

# Conversations whose tier is remembered; 16 bytes and a name each.
_REMEMBERED = 10_000


class TierRouter:
    """Decides tiers for one deployment, and learns how long replies are.

    `router` has the deployment's rules; `costs` tells what each tier would cost now.
    """

    costs: Callable[[], Sequence[TierCost]]

    def __init__(
        self,
        tiers: TierSet,
        router: Router,
        *,
        untiered: str,
    ) -> None:
        self.tiers = tiers
        self._router = router
        self._untiered = untiered
        self._conversations: OrderedDict[bytes, str] = OrderedDict()
        self._lengths = ReplyLengths()
        # Set once the engine is up and has been asked; see `engine.rendering`.
        self.unrendered: frozenset[str] = frozenset()

    def tier(
        self, api: Api, body: dict[str, Any], header: str | None, namespace: str
    ) -> TieredRequest:
        """The request with its tier in it.

        An explicit tier wins; a request with a system prompt of its own and no tier asked for is
        left alone.

        Raises:
            RequestError: the header names an unknown tier, or an explicit tier and the client's
                tools can't be joined.
        """
        chat = read(api, body)
        asked = asked_tier(chat, header, self.tiers)
        if asked and asked != AUTO:
            return self._apply(api, body, self._named(asked), "explicit")
        own = has_own_system(chat)
        if not asked and (self._untiered == "pass" or own or is_raw(chat)):
            reason = "own-prompt" if own else "untiered"
            return TieredRequest(body, None, reason, unrendered=self.unrendered, chat=chat)
        conversation = self._conversation(chat, namespace)
        decision = self.decide(chat, tier_so_far=self._tier_so_far(conversation))
        tier = self.tiers.get(decision.tier) or self.tiers.default
        try:
            tiered = self._apply(api, body, tier, decision.reason.value)
        except RequestError:
            # The client defines one of the tier's tools otherwise; its own tools are what it
            # wants, so the tier without any goes with them.
            tier = next(iter(self.tiers))
            tiered = self._apply(api, body, tier, "client-tools")
        self._remember(conversation, tier.name)
        return replace(tiered, decision=decision)

    def decide(
        self,
        chat: Mapping[str, Any],
        *,
        tier_so_far: str | None = None,
        explain: bool = False,
    ) -> Decision:
        """The router's decision for a request in chat's terms; with `explain`, what moved it."""
        request = route_request(chat, tier_so_far=tier_so_far)
        return self._router.route(
            request, self.costs(), reply_tokens=self._lengths.expected(), explain=explain
        )

    def note(self, tiered: TieredRequest, reply: Reply | None) -> None:
        """Learn from the reply of a routed request how long its kind's are."""
        if tiered.decision is None or reply is None or reply.counts is None:
            return
        # One that was cut off says how long its client let it be.
        if reply.finish_reason != "length":
            self._lengths.learn(tiered.decision.kind, reply.counts.decoded)

    def escalated(
        self,
        api: Api,
        body: dict[str, Any],
        now: TieredRequest,
        escalation: Escalation,
        namespace: str,
    ) -> TieredRequest | None:
        """The request one tier up, None if there is none."""
        assert now.tier
        up = self.tiers.next_up(now.tier.name)
        if up is None:
            return None
        self._remember(self._conversation(read(api, body), namespace), up.name)
        reason = f"escalated from {now.tier.name}: {escalation.cause.value}"
        return self._apply(api, body, up, reason)

    def _apply(self, api: Api, body: dict[str, Any], tier: Tier, reason: str) -> TieredRequest:
        return apply_tier(api, body, tier, reason, unrendered=self.unrendered)

    def _named(self, name: str) -> Tier:
        tier = self.tiers.get(name)
        assert tier is not None
        return tier

    def _conversation(self, chat: dict[str, Any], namespace: str) -> list[bytes]:
        """Digests of the conversation so far, the longest last."""
        shaped = shaping(chat, self.unrendered)
        prompt = prompt_of(shaped, fingerprint="conversation", namespace=namespace)
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
