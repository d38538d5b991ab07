"""How far a prompt is while its slot is filled, for a client that asks (`return_progress`).

The engine tells it in its own stream, which begins behind the fill. Until then these chunks are in
the engine's form and go in place of pings. Their `total` is the whole prompt's tokens, an estimate
where nobody has counted it; the engine's own chunks go on from there.

Chat completions alone: a stream of responses begins with an event that names the engine's id of it,
and of raw prompts nothing is filled.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from keepwarm.api.dialect import OPENAI
from keepwarm.core.job import Progress
from keepwarm.core.plan import prompt_tokens
from keepwarm.gateway.client_request import PLANNED

if TYPE_CHECKING:
    from keepwarm.deployment.deployment import Deployment
    from keepwarm.gateway.exchange import Exchange
    from keepwarm.gateway.opening import Opening


def tell_fill(deployment: Deployment, exchange: Exchange, opening: Opening) -> None:
    """Have a client see how far the fill of its prompt is, if it asked for that."""
    asked, job = exchange.asked, exchange.job
    # A client of the messages API has another dialect on the same path of the engine.
    if asked.body.get("return_progress") is not True or asked.dialect is not OPENAI:
        return
    if PLANNED.get(asked.path) != "chat":
        return
    created_s = int(time.time())

    def told(at: Progress) -> None:
        total = max(prompt_tokens(job.demand(), deployment.dispatcher.rates), at.total)
        chunk = {
            "choices": [
                {
                    "finish_reason": None,
                    "index": 0,
                    "delta": {"role": "assistant", "content": None},
                }
            ],
            "created": created_s,
            "id": f"chatcmpl-{exchange.id}",
            "model": str(asked.body.get("model") or ""),
            "object": "chat.completion.chunk",
            "prompt_progress": at._replace(total=total)._asdict(),
        }
        opening.progressed(b"data: " + msgspec.json.encode(chunk) + b"\n\n")

    job.on_fill = told
