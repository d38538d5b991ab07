"""The fleet's one endpoint: reads a request, lets the router choose a node, streams the answer.

Needs Ray. A node that dies before the first byte of its answer has cost nothing but time: the
request goes to another. Once something was sent it can't be taken back; the stream then ends with
an error event that says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from keepwarm.fleet.replica import Head
from keepwarm.fleet.router import ROUTERS
from keepwarm.fleet.wire import ask_of

log = logging.getLogger("keepwarm.fleet")

TRIES = 3
_GONE = (
    "The node that answered this request went away in the middle of it. The fleet goes on; send "
    "the request again."
)
_NOBODY = "No node could answer this request: each that was tried went away. Send it again."


class Front:
    """See the module. Made by Serve."""

    def __init__(self, nodes: Any) -> None:
        """Take a handle of the nodes' deployment."""
        self._nodes = nodes.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        if request.url.path == "/keepwarm/fleet":
            return Response(msgspec.json.encode(fleet_status()), media_type="application/json")
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        ask = ask_of(request.method, path, request.headers.items(), await request.body())
        for attempt in range(1, TRIES + 1):
            answer = self._nodes.ask.remote(ask)
            try:
                head: Head = await anext(answer)
            except (RayError, RayServeException, StopAsyncIteration) as error:
                log.warning("try %d of %d failed: %s", attempt, TRIES, type(error).__name__)
                continue
            kept = {name: value for name, value in head.headers if name.lower() != "content-type"}
            kind = next((v for n, v in head.headers if n.lower() == "content-type"), None)
            return StreamingResponse(
                _streamed(answer, kind or ""), head.status, headers=kept, media_type=kind
            )
        return Response(msgspec.json.encode(_error(_NOBODY)), 503, media_type="application/json")


async def _streamed(answer: Any, kind: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer:
            yield chunk
    except (RayError, RayServeException) as error:
        log.warning("a node went away in the middle of an answer: %s", type(error).__name__)
        if not kind.startswith("text/event-stream"):
            raise  # a body that was cut off is told by its end
        yield b"\n\nevent: error\ndata: " + msgspec.json.encode(_error(_GONE)) + b"\n\n"
    finally:
        answer.cancel()


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "node_unavailable", "code": 503}}


def fleet_status() -> dict[str, Any]:
    """What this process's router knows of the nodes."""
    nodes: dict[str, Any] = {}
    now_s = time.time()
    known = 0
    for router in list(ROUTERS):
        known = max(known, router.fleet.known_prefixes)
        for name in router.fleet.nodes:
            told = router.told.get(name)
            nodes[name] = {
                "state": told.state if told else "unknown",
                "heard_s_ago": round(now_s - router.heard_s[name], 1) if told else None,
                "backlog_s": round(router.fleet.wait_s(name, now_s=now_s), 3),
                "prefixes": len(told.held) // 8 if told else 0,
                "stored": len(told.stored) // 8 if told else 0,
                **(told.about if told else {}),
            }
    return {"nodes": nodes, "known_prefixes": known}
