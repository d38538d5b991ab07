"""The HTTP server: routes, errors, health, metrics."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import msgspec
from aiohttp import web

from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.explaining import observe_deployment
from keepwarm.deployment.life import Life
from keepwarm.errors import (
    EngineDownError,
    ForbiddenError,
    NotFoundError,
    RequestError,
)
from keepwarm.explain.metrics import merged
from keepwarm.gateway.batch_api import batch_handlers
from keepwarm.gateway.door import Answer, Door, go_on, let_page_read, namespace_of, read_body
from keepwarm.gateway.pages import page_handlers
from keepwarm.gateway.proxy import Proxy
from keepwarm.gateway.views import listed_models, listed_tiers, models_now, status_now

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
            "models_now": self.models_now,
            "change_model": self.change_model,
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
        if life.models.several:
            return _json(listed_models(life))
        body: dict[str, Any] = {"object": "list"}
        if stay := await life.glanced():
            with stay as deployment:
                body = await deployment.client.models()
        body.setdefault("data", []).extend(listed_tiers(life))
        return _json(body)

    async def models_now(self, _: web.Request) -> web.StreamResponse:
        """All models with their states and sizes."""
        return _json(models_now(self._life))

    async def change_model(self, request: web.Request) -> web.StreamResponse:
        """Load, unload, pin or unpin a model; answers when that is done."""
        life, action = self._life, request.match_info["action"]
        if not life.keys.sees_all(namespace_of(request)):
            raise ForbiddenError("Only an operator's key (server.operators) may change models.")
        model = life.models.named(request.match_info["name"])
        if action == "load":
            await life.turns.load(model)
        elif action == "unload":
            await life.turns.unload(model)
        elif action in ("pin", "unpin"):
            model.is_pinned = action == "pin"
            life.turns.news()
        else:
            raise NotFoundError(f"There is no {action[:40]!r} of a model.")
        return _json(model.as_dict())

    async def status(self, request: web.Request) -> web.StreamResponse:
        """What is warm where."""
        life = self._life
        return _json(status_now(life, namespace_of(request)))

    async def route(self, request: web.Request) -> web.StreamResponse:
        """Explain which tier a chat body, or a `{"text": ...}`, would get now."""
        try:
            body = msgspec.json.decode(await read_body(request), type=dict)
        except msgspec.DecodeError as error:
            raise RequestError(f"The request body isn't a JSON object: {error}.") from error
        if "messages" not in body:
            body = {"messages": [{"role": "user", "content": str(body.get("text", ""))}]}
        with await self._life.admitted() as deployment:
            return _json(deployment.router.decide(body, explain=True).to_json())

    async def engine_slots(self, request: web.Request) -> web.StreamResponse:
        """The engine's `/slots`; of them only which are at work, where others' are among them."""
        stay = await self._life.glanced()
        if stay is None:
            return _json([])
        with stay as deployment:
            slots = await deployment.client.slots()
        if not self._life.keys.sees_all(namespace_of(request)):
            shown = ("id", "n_ctx", "speculative", "is_processing")
            slots = [{key: slot[key] for key in shown if key in slot} for slot in slots]
        return _json(slots)


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )
