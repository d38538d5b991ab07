"""Asks the model which tier a task needs, where that may pay; see `router.judge`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from keepwarm.core.hints import BATCH, PRIORITY_HEADER
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Reply
from keepwarm.errors import KeepwarmError
from keepwarm.gateway.client_request import ClientRequest
from keepwarm.router.judge import judges_prompt, question_of, verdict_of
from keepwarm.tiers.tiering import Tiered, apply_tier

log = logging.getLogger("keepwarm")

# It decides between tiers that the scores can't tell apart, and errs too: what it may save counts
# by half.
_TRUST = 0.5

Ask = Callable[[ClientRequest, Tiered], Awaitable[Reply | None]]


class Judge:
    """One deployment's judge. `ask` serves a request of ours to its end; it may raise as proxies
    do. Whatever goes wrong, the scores' decision stands.
    """

    def __init__(self, ask: Ask, *, timeout_s: float) -> None:
        self._ask = ask
        self._timeout_s = timeout_s
        self._prompt = judges_prompt()

    def is_worth_asking(self, text: str, *, doubt_s: float, rates: Rates) -> bool:
        """Whether what a sure answer saves on average is more than asking costs now."""
        question = question_of(text)["messages"][0]["content"]
        tokens = int(len(question) * rates.tokens_per_char.value) + 1
        asking_s = rates.prefill_s(tokens) + rates.decode_s_per_token.value
        return bool(text) and _TRUST * doubt_s > asking_s

    async def verdict(self, text: str, *, namespace: str, priority: int) -> str | None:
        """The tier the model names for a request of that key and priority; None if it can't say
        in time.
        """
        body = question_of(text)
        headers = {PRIORITY_HEADER: BATCH} if priority else {}
        asked = ClientRequest("chat", body, namespace, "/v1/chat/completions", headers)
        tiered = apply_tier("chat", body, self._prompt, "judge")
        try:
            reply = await asyncio.wait_for(self._ask(asked, tiered), self._timeout_s)
        except (KeepwarmError, TimeoutError) as error:
            log.info("the model wasn't heard on a tier: %s", error or "it took too long")
            return None
        said = reply.segment.text if reply is not None and reply.segment else None
        return verdict_of(said)
