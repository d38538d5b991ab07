"""The HTTP server: routes, errors, health, metrics."""

from __future__ import annotations

import logging
from contextlib import closing

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from keepwarm.core.prompt import Api
from keepwarm.errors import (
    EngineDownError,
    EngineRefusedError,
    KeepwarmError,
    RequestError,
    TooLargeError,
)
from keepwarm.gateway.asked import PLANNED
from keepwarm.gateway.batch_api import add_batch_routes
from keepwarm.gateway.dialect import dialect_of
from keepwarm.gateway.ending import observe_deployment
from keepwarm.gateway.metrics import merged
from keepwarm.gateway.pages import add_page_routes
from keepwarm.gateway.proxy import Proxy, error_response
from keepwarm.gateway.runtime import Runtime, State
from keepwarm.gateway.tiering import AUTO

log = logging.getLogger("keepwarm")


def make_app(runtime: Runtime) -> web.Application:
    """The application over a runtime, which may still be starting."""
    app = web.Application(
        client_max_size=runtime.settings.server.max_body_bytes,
        middlewares=[_errors(runtime)],
    )
    proxy = Proxy(runtime)
    site = _Site(runtime)

    def planned(api: Api) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await proxy.handle(request, api)

        return handle

    for path, api in PLANNED.items():
        app.router.add_post(path, planned(api))
    app.router.add_post("/v1/messages", proxy.handle_messages)
    app.router.add_get("/health", site.health)
    app.router.add_get("/metrics", site.metrics)
    app.router.add_get("/v1/models", site.models)
    app.router.add_get("/models", site.models)
    app.router.add_get("/keepwarm/status", site.status)
    app.router.add_post("/keepwarm/route", site.route)
    app.router.add_post("/slots/{id}", site.refuse_slot_action)
    app.router.add_post("/lora-adapters", site.refuse_adapters)
    add_batch_routes(app, runtime, proxy)
    add_page_routes(app, runtime)
    app.router.add_route("*", "/{path:.*}", proxy.pass_through)
    return app


def _errors(runtime: Runtime) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except EngineRefusedError as error:
            return web.Response(
                body=error.body, status=error.refused_status, content_type="application/json"
            )
        except KeepwarmError as error:
            runtime.metrics.failed(error.kind)
            if error.status >= 500:
                log.warning("%s %s: %s", request.method, request.path, error)
            response = error_response(error, dialect_of(request.path))
            response.headers.update(error.headers)
            return response
        except web.HTTPRequestEntityTooLarge:
            limit = runtime.settings.server.max_body_bytes
            too_large = TooLargeError(
                f"The request body is over {limit:,} bytes (server.max_body_bytes)."
            )
            return error_response(too_large, dialect_of(request.path))

    return middleware


class _Site:
    """Keepwarm's own pages."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def health(self, _: web.Request) -> web.StreamResponse:
        """200 only when all pinned prefixes are warm."""
        runtime = self._runtime
        ready = runtime.state is State.READY
        body = {"status": "ok" if ready else runtime.state.value, "detail": runtime.status}
        return _json(body, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Keepwarm's metrics and the engine's."""
        runtime = self._runtime
        runtime.keys.namespace(request.headers)
        await runtime.explainer.settled()
        observe_deployment(runtime)
        text = runtime.metrics.text()
        try:
            sent = runtime.client.http.request("GET", "/metrics", headers={})
            with closing(await sent) as reply:
                if reply.status == 200:
                    text = merged(text, await reply.read())
        except (EngineDownError, AttributeError):
            log.debug("the engine's metrics aren't available")
        return web.Response(body=text, content_type="text/plain", charset="utf-8")

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The engine's model and the tiers as virtual ones."""
        runtime = self._runtime
        runtime.keys.namespace(request.headers)
        await runtime.admitted()
        body = await runtime.client.models()
        created = int(runtime.started_s)
        for name in (*runtime.tiers.names, AUTO):
            tier = runtime.tiers.get(name)
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
        runtime = self._runtime
        runtime.keys.namespace(request.headers)
        body = {
            "state": runtime.state.value,
            "status": runtime.status,
            "engine_pid": runtime.engine_pid,
            "engine_url": runtime.client.base_url if hasattr(runtime, "client") else None,
            "warmed": [w.as_dict() for w in runtime.prefixes.warmed],
        }
        if hasattr(runtime, "dispatcher"):
            body["slots"] = [
                {
                    "id": slot.id,
                    "state": slot.state.value,
                    "tokens": slot.content.tokens if slot.content else 0,
                    "saved_tokens": slot.content.saved_tokens if slot.content else 0,
                }
                for slot in runtime.dispatcher.scheduler.slots
            ]
            body["store"] = msgspec.to_builtins(runtime.store.stats())
        return _json(body)

    async def route(self, request: web.Request) -> web.StreamResponse:
        """Explain which tier a chat body, or a `{"text": ...}`, would get now."""
        runtime = self._runtime
        runtime.keys.namespace(request.headers)
        await runtime.admitted()
        try:
            body = msgspec.json.decode(await request.read(), type=dict)
        except msgspec.DecodeError as error:
            raise RequestError(f"The request body isn't a JSON object: {error}.") from error
        if "messages" not in body:
            body = {"messages": [{"role": "user", "content": str(body.get("text", ""))}]}
        return _json(runtime.router.decide("chat", body, explain=True).to_json())

    async def refuse_slot_action(self, _: web.Request) -> web.StreamResponse:
        """Slots are Keepwarm's to change."""
        raise RequestError(
            "Slots are saved, restored and erased by Keepwarm itself; /slots is read-only here."
        )

    async def refuse_adapters(self, _: web.Request) -> web.StreamResponse:
        """What is saved and what slots hold was computed with the adapters there were."""
        raise RequestError(
            "Adapters for all requests can't be changed while Keepwarm keeps what was computed "
            'without the change. Name them in a request ("lora"), or start the server with them.'
        )


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )
