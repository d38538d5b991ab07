"""The fleet's one endpoint: reads a request, lets the router choose a node, streams the answer.

Needs Ray. A node that dies before the first byte of its answer has cost nothing but time: the
request goes to another. Once something was sent it can't be taken back; the stream then ends with
an error event that says so.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from keepwarm.core.hygiene import hygiene_of
from keepwarm.errors import RequestError
from keepwarm.fleet.admission import admission_of, is_page
from keepwarm.fleet.config import fleet_of
from keepwarm.fleet.replica import Head
from keepwarm.fleet.status import fleet_metrics, fleet_status
from keepwarm.fleet.wire import ask_of, bounded
from keepwarm.gateway.pages import load_page
from keepwarm.keys import load_keys
from keepwarm.settings import load_settings

log = logging.getLogger("keepwarm.fleet")

TRIES = 3
_GONE = (
    "The node that answered this request went away in the middle of it. The fleet goes on; send "
    "the request again."
)
# Files and batches are a node's own, and the next request may go to another node.
_OF_ONE_NODE = ("/v1/files", "/v1/batches")
_NO_BATCHES = (
    "A fleet keeps no files and batches. Send the tasks as requests of their own, with the header "
    "X-Keepwarm-Priority: batch; each goes to the node that has its prefix."
)
_NOBODY = "No node could answer this request: each that was tried went away. Send it again."


class Front:
    """See the module. Made by Serve."""

    def __init__(self, nodes: Any, plain: dict[str, Any]) -> None:
        """Take a handle of the nodes' deployment, and the fleet's config as plain values."""
        self._nodes = nodes.options(stream=True)
        config = fleet_of(plain, source="fleet config")
        settings = load_settings(flags=config.node_flags())[0]
        self._max_body_bytes = settings.server.max_body_bytes
        keys = load_keys(settings.server.api_keys, settings.server.api_key_file)
        self._admission = admission_of(settings.server, keys)
        self._hygiene = hygiene_of(settings.hygiene.rules, settings.hygiene.drop_lines)
        self._html, self._html_headers = load_page("fleet.html")

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return await self._answer(request)
        except RequestError as error:
            return _refused(str(error), error.kind, error.status)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        self._admission.check(request.method, path, request.headers)
        if path == "/keepwarm":
            return RedirectResponse("/keepwarm/", 301)
        if path == "/keepwarm/":
            # Open, as at a node: what it shows comes from /keepwarm/fleet, which asks for the key.
            return Response(self._html, media_type="text/html", headers=self._html_headers)
        if is_page(request.method, path):
            return _PAGES[path]()
        if path.startswith(_OF_ONE_NODE):
            return _refused(_NO_BATCHES, "invalid_request_error", 501)
        declared = request.headers.get("content-length")
        body = await bounded(request.stream(), declared, most=self._max_body_bytes)
        return await self._pass_on(request, body)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        ask = ask_of(request.method, path, request.headers.items(), body, self._hygiene)
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
        return _refused(_NOBODY, "node_unavailable", 503)


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


def _error(message: str, kind: str = "node_unavailable", code: int = 503) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code}}


def _refused(message: str, kind: str, status: int) -> Response:
    body = msgspec.json.encode(_error(message, kind, status))
    return Response(body, status, media_type="application/json")


def _status_page() -> Response:
    return Response(msgspec.json.encode(fleet_status()), media_type="application/json")


def _metrics_page() -> Response:
    return Response(fleet_metrics(), media_type="text/plain; version=0.0.4")


_PAGES = {"/keepwarm/fleet": _status_page, "/metrics": _metrics_page}
