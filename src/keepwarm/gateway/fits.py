"""What a request may come to: whether its prompt fits at all, and where its reply must end.

What can't be served is refused before anybody makes room for it, and that is decided by the
engine's own count. In a shared pool a reply is bounded to what the plan has reserved for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from keepwarm.api.dialect import Dialect
from keepwarm.core.job import Job
from keepwarm.core.plan import prompt_tokens
from keepwarm.errors import EngineRefusedError

if TYPE_CHECKING:
    from keepwarm.deployment.runtime import Runtime

# The names of a reply's limit in the APIs that llama-server has; the first one given counts there.
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
# Without a limit a reply may come to whatever there is room for.
NO_LIMIT = 1 << 31
# A prompt whose estimate is over this part of its room is counted: some 9 ms a thousand tokens. In
# a shared pool sooner, since what the estimate may lack is kept free beside it.
_NEARLY, _NEARLY_IN_POOL = 0.9, 0.6


def reply_limit(body: Mapping[str, Any]) -> int:
    """Tokens that each reply may come to, by what the client says."""
    for name in _LIMITS:
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return max(value, 1)
    return NO_LIMIT


def bounded(body: Mapping[str, Any], reply_tokens: int) -> dict[str, Any]:
    """What a body must say so that its reply ends within this (0: it may say what it likes)."""
    if not reply_tokens or reply_limit(body) <= reply_tokens:
        return {}
    return dict.fromkeys([name for name in _LIMITS if name in body] or _LIMITS[:1], reply_tokens)


async def check_fits(runtime: Runtime, dialect: Dialect, job: Job) -> None:
    """Count a prompt that may be too long, and refuse it if it is.

    Raises:
        EngineRefusedError: as the engine would, before anything was done for it.
    """
    pool = runtime.machine.pool_tokens
    room = min(runtime.slot_tokens, pool or runtime.slot_tokens)
    nearly = _NEARLY if pool is None else _NEARLY_IN_POOL
    if prompt_tokens(job.demand(), runtime.dispatcher.rates) < nearly * room:
        return
    if job.chat is not None and not job.is_counted:
        # An engine that is down is waited for as ever; what it refuses, it will say itself.
        await runtime.dispatcher.count_ahead(job)
    if job.ids is None or (tokens := int(job.ids.size)) < room:
        return
    message = f"The prompt has {tokens:,} tokens, and there is room for {room:,}."
    error = {"code": 400, "message": message, "type": "exceed_context_size_error"}
    error |= {"n_prompt_tokens": tokens, "n_ctx": room}
    raw = msgspec.json.encode({"error": error})
    raise EngineRefusedError(message, status=400, body=dialect.whole(raw, status=400))
