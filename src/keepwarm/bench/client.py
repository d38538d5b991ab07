"""The benchmark's client: one streamed chat request, timed from outside.

It knows nothing of the server but the OpenAI chat API. Each request takes a connection of its own,
as most clients of a local server do, so that no arm profits from a kept one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from keepwarm.core.reply import Counts, counts_of
from keepwarm.errors import EngineDownError, EngineError

# A cold prefill of a large prompt by a large model on a small machine.
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class TimedReply:
    """One reply. `plan` and `tier` are headers Keepwarm adds, '' from other servers.

    `filled_tokens` are those that Keepwarm prefilled ahead, which the counts call cached.
    """

    ttft_s: float
    total_s: float
    text: str
    counts: Counts
    plan: str
    filled_tokens: int = 0
    tier: str = ""


class ChatClient:
    """Asks one server. Close it when done."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def ask(self, base_url: str, body: Mapping[str, Any]) -> TimedReply:
        """Send one chat request and read its stream to the end.

        Args:
            base_url: the server's address, without a path.
            body: a chat-completions body; streaming and usage are asked for here.

        Raises:
            EngineDownError: the server can't be reached or ended the stream early.
            EngineError: it answered with an error, or without its counts.
        """
        data = msgspec.json.encode(
            {**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        headers = {"Content-Type": "application/json"}
        url = base_url + "/v1/chat/completions"
        began = time.perf_counter()
        try:
            async with self._session.post(url, data=data, headers=headers) as response:
                if response.status != 200:
                    said = (await response.read())[:300].decode("utf-8", "replace")
                    raise EngineError(f"{url} answered {response.status}: {said}")
                return await _read(response, began)
        except aiohttp.ClientError as error:
            raise EngineDownError(f"{url} gave no whole answer: {error}.") from error

    async def get(self, url: str) -> tuple[int, Any]:
        """A page's status and JSON; (0, None) where nobody listens."""
        try:
            async with self._session.get(url) as response:
                raw = await response.read()
                return response.status, msgspec.json.decode(raw)
        except (aiohttp.ClientError, msgspec.DecodeError):
            return 0, None


async def _read(response: aiohttp.ClientResponse, began: float) -> TimedReply:
    first: float | None = None
    text: list[str] = []
    counts: Counts | None = None
    async for line in response.content:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        event = msgspec.json.decode(line[5:])
        if said := content_of(event):
            first = first or time.perf_counter()
            text.append(said)
        if "error" in event:
            raise EngineError(f"The server ended the stream with an error: {event['error']}")
        # llama-server's own count comes last and is the most exact one.
        counts = counts_of(event) or counts
    ended = time.perf_counter()
    if counts is None:
        raise EngineError("The server's reply holds no token counts, so nothing can be proved.")
    return TimedReply(
        (first or ended) - began,
        ended - began,
        "".join(text),
        counts,
        plan=response.headers.get("X-Keepwarm-Plan", ""),
        filled_tokens=int(response.headers.get("X-Keepwarm-Filled", "0")),
        tier=response.headers.get("X-Keepwarm-Tier", ""),
    )


def content_of(event: Mapping[str, Any]) -> str:
    """What one event of a stream says: text, reasoning, or a piece of a tool call."""
    said = ""
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        said += delta.get("content") or delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            said += (function.get("name") or "") + (function.get("arguments") or "")
    return said
