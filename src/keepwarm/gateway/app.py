"""The HTTP server: routes, errors, health, metrics."""

from __future__ import annotations

import logging
from contextlib import closing

import msgspec
from aiohttp import web

from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.explaining import observe_deployment
from keepwarm.deployment.life import Life
from keepwarm.errors import (
    EngineDownError,
    RequestError,
)
from keepwarm.explain.metrics import merged
from keepwarm.gateway.batch_api import batch_handlers
from keepwarm.gateway.door import Answer, Door, go_on, let_page_read, namespace_of, read_body
from keepwarm.gateway.pages import page_handlers
from keepwarm.gateway.proxy import Proxy
from keepwarm.gateway.views import status_now
from keepwarm.tiers.tiering import AUTO

log = logging.getLogger("keepwarm")


def make_app(life: Life) -> web.Application:
    """The application over a life, which may still be starting."""
    app = web.Application(client_max_size=life.settings.server.max_body_bytes)
    proxy = Proxy(life)
    site = _Site(life)
    own = {
        **site.handlers(),
        **batch_handlers(app, life, proxy),
        **page_handlers(app, life),
    }
    door = Door(life, own=own, planned=proxy.handle, passed=proxy.pass_through)
    # The table of routes is `api.routes`; aiohttp only brings what comes to the door.
    app.router.add_route("*", "/{path:.*}", door.answer, expect_handler=go_on)
    app.middlewares.append(door.unrouted)
    app.on_response_prepare.append(let_page_read)
    return app


class _Site:
    """Keepwarm's own pages."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def handlers(self) -> dict[str, Answer]:
        """By the names of the table of routes."""
        return {
            "knock": self.knock,
            "health": self.health,
            "metrics": self.metrics,
            "models": self.models,
            "status": self.status,
            "engine_slots": self.engine_slots,
            "route": self.route,
        }

    async def knock(self, _: web.Request) -> web.StreamResponse:
        """Clients ask for `HEAD /` to see whether somebody is there."""
        return web.Response(status=200)

    async def health(self, _: web.Request) -> web.StreamResponse:
        """200 only when all pinned prefixes are warm."""
        life = self._life
        ready = life.state is State.READY
        body = {"status": "ok" if ready else life.state.value, "detail": life.status}
        return _json(body, status=200 if ready else 503)

    async def here(self, _: web.Request) -> web.StreamResponse:
        """Nothing but the status."""
        return web.Response()

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Keepwarm's metrics and the engine's."""
        life = self._life
        if not life.keys.sees_all(namespace_of(request)):
            text = life.metrics.text_for_everyone()
            return web.Response(body=text, content_type="text/plain", charset="utf-8")
        await life.explainer.settled()
        observe_deployment(life.deployment)
        text = life.metrics.text()
        if life.deployment.is_open:
            text = merged(text, await self._engine_metrics(life.deployment))
        return web.Response(body=text, content_type="text/plain", charset="utf-8")

    async def _engine_metrics(self, deployment: Deployment) -> bytes:
        """What the engine tells of itself; nothing where it doesn't answer."""
        try:
            sent = deployment.client.http.request("GET", "/metrics", headers={})
            with closing(await sent) as reply:
                return await reply.read() if reply.status == 200 else b""
        except EngineDownError:
            log.debug("the engine's metrics aren't available")
            return b""

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The engine's model and the tiers as virtual ones."""
        life = self._life
        deployment = await life.admitted()
        body = await deployment.client.models()
        created = int(life.started_s)
        for name in (*deployment.tiers.names, AUTO):
            tier = deployment.tiers.get(name)
            text = tier.description if tier else "routed to the smallest tier that can do the task"
            body.setdefault("data", []).append(
                {
                    "id": name,
                    "object": "model",
                    "created": created,
                    "owned_by": "keepwarm",
                    "description": text,
                }
            )
        return _json(body)

    async def status(self, request: web.Request) -> web.StreamResponse:
        """What is warm where."""
        life = self._life
        return _json(status_now(life, namespace_of(request)))

    async def route(self, request: web.Request) -> web.StreamResponse:
        """Explain which tier a chat body, or a `{"text": ...}`, would get now."""
        deployment = await self._life.admitted()
        try:
            body = msgspec.json.decode(await read_body(request), type=dict)
        except msgspec.DecodeError as error:
            raise RequestError(f"The request body isn't a JSON object: {error}.") from error
        if "messages" not in body:
            body = {"messages": [{"role": "user", "content": str(body.get("text", ""))}]}
        return _json(deployment.router.decide(body, explain=True).to_json())

    async def engine_slots(self, request: web.Request) -> web.StreamResponse:
        """The engine's `/slots`; of them only which are at work, where others' are among them."""
        deployment = await self._life.admitted()
        slots = await deployment.client.slots()
        if not self._life.keys.sees_all(namespace_of(request)):
            shown = ("id", "n_ctx", "speculative", "is_processing")
            slots = [{key: slot[key] for key in shown if key in slot} for slot in slots]
        return _json(slots)


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )
