"""Fill and save a prefix that several requests are known to share, before they are sent.

Inside a message the engine's tokens don't break where the characters do, so the prefix's tokens
are those which the request itself has in common with two that part from it right there. That holds
for every request that goes on as this one does for one more word; the batch planner cuts at white
space, where no tokenizer joins the words.

It is a job like any other (priority of a batch) which is granted a slot, filled, saved, and ended
without anything being forwarded: the scheduler knows all that happens to its slots.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keepwarm.core.hints import SHARED_HEADER
from keepwarm.core.job import Job
from keepwarm.core.prompt import SharedEnd, is_raw, prefix_of, prompt_of, segments_of
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.life import Life
from keepwarm.engine.client import EngineClient
from keepwarm.engine.static_end import common_length
from keepwarm.errors import RequestError
from keepwarm.gateway.client_request import ClientRequest, asked_of
from keepwarm.tiers.tiering import HEADER

# Both begin with white space, so that the last word before them is whole, and part after it.
_PROBES = (" Quartz", "\n7 mild steps")


@dataclass(frozen=True, slots=True)
class WarmPrefix:
    """A prefix that is saved now: its length, the slot that holds it, and what that took.

    `prefilled_tokens` is 0 where it was known; `plan` says where its beginning came from.
    """

    tokens: int
    prefilled_tokens: int
    plan: str
    slot: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "prefilled_tokens": self.prefilled_tokens,
            "plan": self.plan,
            "slot": self.slot,
            "seconds": round(self.seconds, 4),
        }


async def warm_prefix(life: Life, asked: ClientRequest) -> WarmPrefix:
    """Fill and save the prefix of a request up to the last place its `X-Keepwarm-Shared` names.

    Raises:
        RequestError: no place is named, or one that can't be a prefix's end.
        EngineError: the engine can't render or prefill it.
    """
    began_s = time.monotonic()
    model, name = life.models.addressed(asked.body.get("model"))
    if name is not None:
        asked = replace(asked, body={**asked.body, "model": name})
    with await life.admitted(model, is_batch=True) as deployment:
        return await _warm(life, deployment, asked, began_s)


async def _warm(
    life: Life, deployment: Deployment, asked: ClientRequest, began_s: float
) -> WarmPrefix:
    asked = asked_of(asked, life.hygiene, deployment.takes)
    deployment.metrics.rewritten(asked.rewrites)
    tiered = deployment.router.tier(
        asked.api, asked.body, asked.headers.get(HEADER), asked.namespace
    )
    ends = asked.ends(tiered)
    if not ends:
        raise RequestError(
            f"{SHARED_HEADER} must say where the shared prefix ends, as `segment:characters`."
        )
    segments = segments_of(tiered.chat)
    if any(segment.media for segment in segments[: ends[-1].segment]):
        raise RequestError("A shared prefix ends before the first picture.")
    tokens = await prefix_tokens(deployment.client, tiered.chat, ends[-1])
    if not tokens:
        raise RequestError("Nothing of this request comes before the place that is named.")
    prompt = prompt_of(
        tiered.shaping,
        fingerprint=deployment.fingerprint,
        namespace=asked.namespace,
        shared_segments=tiered.shared_segments,
        ends=ends,
    )
    part = prefix_of(prompt, segments, ends[-1])
    job = Job(
        id=uuid.uuid4().hex[:16],
        namespace=asked.namespace,
        prompt=part,
        arrived_s=began_s,
        deadline_s=math.inf,
        reply_tokens=1,
        priority=1,
        static_shared=part.is_static_shared,
        must_save=True,
    )
    grant = await deployment.dispatcher.acquire(job, tokens)
    deployment.dispatcher.finish(job, counts=None, reply=None, touched=False)
    return WarmPrefix(
        len(tokens),
        job.filled_tokens,
        grant.plan.source.value,
        grant.plan.slot,
        time.monotonic() - began_s,
    )


async def prefix_tokens(client: EngineClient, body: Mapping[str, Any], end: SharedEnd) -> list[int]:
    """The token ids up to a place in a request, as every request has them that shares it.

    `body` is in chat's terms.

    Raises:
        RequestError: the place is inside a message that isn't text.
        EngineError: the engine can't render or tokenize.
    """
    if is_raw(body):
        text = body.get("prompt")
        if not isinstance(text, str):
            raise RequestError("Only prompts that are text have places to share.")
        texts = [text, *(text[: end.chars] + probe for probe in _PROBES)]
    else:
        listed = body["messages"]
        messages = [m for m in listed if isinstance(m, Mapping)] if isinstance(listed, list) else []
        arguments = {key: value for key, value in body.items() if key != "messages"}
        whole = messages or [{"role": "user", "content": _PROBES[0]}]
        if end.segment >= len(messages):
            whole = [*messages, {"role": "user", "content": "Go on."}]
        bodies = [whole, *(_parted(messages, end, probe) for probe in _PROBES)]
        texts = await asyncio.gather(
            *(client.render({**arguments, "messages": listed}) for listed in bodies)
        )
    own, *others = await asyncio.gather(*(client.tokenize(text) for text in texts))
    return own[: min(common_length(own, other) for other in others)]


def _parted(
    messages: Sequence[Mapping[str, Any]], end: SharedEnd, probe: str
) -> list[Mapping[str, Any]]:
    """The messages up to a place, and then something else."""
    before = list(messages[: end.segment])
    if end.segment >= len(messages):
        return [*before, {"role": "user", "content": probe}]
    parted = messages[end.segment]
    text = parted.get("content")
    if end.chars and not isinstance(text, str):
        raise RequestError(
            f"Message {end.segment} isn't plain text: a shared prefix can end before it, not in it."
        )
    shared = str(text)[: end.chars] if end.chars else ""
    return [*before, {"role": parted.get("role"), "content": shared + probe}]
