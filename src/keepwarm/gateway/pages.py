"""Routes under /keepwarm/: the page, its live events, explanations, and the store by hand.

The page itself is static and the same for everyone; all it shows comes from routes that ask for the
API key and answer for that key alone. What is shared by all keys can be changed here only
where there are none.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

import msgspec
from aiohttp import web

from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.forget import forget_key, forgotten_in_all
from keepwarm.deployment.life import Life
from keepwarm.errors import (
    ConflictError,
    ForbiddenError,
    NotFoundError,
    RequestError,
    SnapshotError,
)
from keepwarm.explain.record import brief
from keepwarm.gateway.door import Answer, namespace_of, read_body
from keepwarm.gateway.feed import Feed, encode_event
from keepwarm.gateway.views import HAND, SHARED, overview, slots_now, store_now
from keepwarm.store.types import Listed

_MOST_LISTED = 500


def page_handlers(app: web.Application, life: Life) -> dict[str, Answer]:
    """What answers under /keepwarm/, by the names of the table of routes."""
    pages = _Pages(life)
    life.explainer.on_record = pages.on_record
    app.on_shutdown.append(pages.close)
    return {
        "page": pages.page,
        "overview": pages.overview,
        "slots": pages.slots,
        "events": pages.events,
        "requests": pages.requests,
        "request": pages.request,
        "store": pages.store,
        "change_store": pages.change_store,
        "forget": pages.forget,
    }


class _Pages:
    def __init__(self, life: Life) -> None:
        self._life = life
        self._feed = Feed(lambda namespace: slots_now(life, namespace))
        self._html, self._headers = load_page("index.html")

    def on_record(self, namespace: str, record: dict[str, Any]) -> None:
        """A request was explained: tell who looks."""
        if len(self._feed):
            self._feed.publish(namespace, "request", brief(record))

    async def close(self, _: web.Application) -> None:
        """End the live streams, which would hold up the shutdown."""
        self._feed.close()

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The page, without any data in it. Its address ends in a slash."""
        if not request.path.endswith("/"):
            raise web.HTTPMovedPermanently("/keepwarm/")
        if request.headers.get("If-None-Match") == self._headers["ETag"]:
            return web.Response(status=304, headers=self._headers)
        response = web.Response(
            body=self._html, content_type="text/html", charset="utf-8", headers=self._headers
        )
        response.enable_compression()
        return response

    async def overview(self, request: web.Request) -> web.StreamResponse:
        """What runs, its tiers, and the sums."""
        namespace = namespace_of(request)
        return _json(await overview(self._life, namespace))

    async def slots(self, request: web.Request) -> web.StreamResponse:
        """The slots and the queue at this moment."""
        return _json(slots_now(self._life, namespace_of(request)))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Live: `overview` once, then `slots` when they change and `request` for each that ends."""
        namespace = namespace_of(request)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        listener = self._feed.attach(namespace)
        try:
            first = await overview(self._life, namespace)
            await response.write(encode_event("overview", first))
            while (event := await listener.events.get()) is not None:
                await response.write(event)
        except ConnectionResetError:
            pass  # the browser has gone
        finally:
            self._feed.detach(listener)
        return response

    async def requests(self, request: web.Request) -> web.StreamResponse:
        """The latest requests in brief: `?limit=`, `?before=` (a time), `?cause=`."""
        namespace = namespace_of(request)
        query = request.query
        records = await self._life.explainer.latest(
            namespace=namespace,
            limit=int(_number(query.get("limit", "100"), most=_MOST_LISTED)),
            before_s=_number(query["before"], most=1e12) if "before" in query else None,
            cause=query.get("cause") or None,
        )
        return _json({"requests": [brief(record) for record in records]})

    async def request(self, request: web.Request) -> web.StreamResponse:
        """One request with its explanation; `last` is the latest."""
        namespace = namespace_of(request)
        found = await self._life.explainer.get(request.match_info["id"], namespace=namespace)
        if found is None:
            raise NotFoundError(
                "There is no such request here. The last few thousand of an API key are kept."
            )
        return _json(found)

    async def store(self, request: web.Request) -> web.StreamResponse:
        """What is saved, as a tree, and which slots hold it."""
        return _json(await store_now(self._life, namespace_of(request)))

    async def change_store(self, request: web.Request) -> web.StreamResponse:
        """Pin, unpin or evict one extent by hand."""
        namespace = namespace_of(request)
        action = request.match_info["action"]
        if action not in ("pin", "unpin", "evict"):
            raise NotFoundError(f"There is no {action[:40]!r} of an extent.")
        if request.content_type != "application/json":
            # A form on another site can't send this type without being asked first.
            raise RequestError("Send `Content-Type: application/json`.")
        with await self._life.admitted() as deployment:
            return _json(await self._changed(deployment, request, action, namespace))

    async def _changed(
        self, deployment: Deployment, request: web.Request, action: str, namespace: str
    ) -> dict[str, Any]:
        extent = await self._extent(deployment, request.match_info["extent"], namespace)
        try:
            if action == "pin":
                return await _pin(deployment, extent, namespace)
            if action == "unpin":
                return await _unpin(deployment, extent)
            removed = await deployment.store.evict_extent(extent.extent_id)
        except SnapshotError as error:
            if error.reason == "unknown":
                raise NotFoundError("It is gone already.") from error
            raise ConflictError(f"It can't be done: {error}.") from error
        return {"evicted": list(removed.extents), "bytes": removed.size_bytes}

    async def forget(self, request: web.Request) -> web.StreamResponse:
        """Forget all that is one key's own: `{"key": NAME}`. For operators, and for that key."""
        namespace = namespace_of(request)
        if request.content_type != "application/json":
            raise RequestError("Send `Content-Type: application/json`.")
        try:
            asked = msgspec.json.decode(await read_body(request), type=dict[str, Any])
        except (msgspec.DecodeError, ValueError) as error:
            raise RequestError('Send `{"key": NAME}`.') from error
        name = asked.get("key")
        if not isinstance(name, str) or not name:
            raise RequestError('Send `{"key": NAME}`: the name of an API key.')
        if name != namespace and not self._life.keys.sees_all(namespace):
            raise ForbiddenError("Only an operator's key (server.operators) may forget another's.")
        told, directories = [], []
        for model in self._life.models:
            # Each is loaded for it: what it has saved is in a store that only its engine opens.
            with await self._life.admitted(model) as deployment:
                directories.append(str(deployment.store.settings.directory))
                try:
                    told.append(await forget_key(deployment, name))
                except SnapshotError as error:
                    raise ConflictError(f"Not all of it is gone: {error}. Ask again.") from error
        return _json(
            {"directory": ", ".join(directories), **msgspec.to_builtins(forgotten_in_all(told))}
        )

    async def _extent(self, deployment: Deployment, number: str, namespace: str) -> Listed:
        """The extent, if this namespace may change it."""
        listed = await deployment.store.list_extents()
        for extent in listed:
            if str(extent.extent_id) == number and extent.namespace in (SHARED, namespace):
                if extent.namespace == SHARED and self._life.keys:
                    raise ForbiddenError("All API keys share this prefix, so none may change it.")
                return extent
        raise NotFoundError("There is no such extent here.")


async def _pin(deployment: Deployment, extent: Listed, namespace: str) -> dict[str, Any]:
    at_tokens = await deployment.store.last_end(extent.extent_id)
    name = f"{HAND}{namespace}:{extent.extent_id}"
    await deployment.store.pin(
        name,
        extent.extent_id,
        at_tokens,
        origin=extent.origin,
        prefill_s=deployment.dispatcher.rates.prefill_s(at_tokens),
    )
    return {"pinned": extent.extent_id, "tokens": at_tokens}


async def _unpin(deployment: Deployment, extent: Listed) -> dict[str, Any]:
    """Let go of it; a tier's pin stays as long as there is the tier."""
    loose = [name for name in extent.pins if not name.startswith("tier:")]
    if not loose:
        raise ConflictError(
            "A tier needs it; it goes with the tier." if extent.pins else "It isn't pinned."
        )
    for name in loose:
        await deployment.store.unpin(name)
    return {"unpinned": extent.extent_id}


def load_page(name: str) -> tuple[bytes, dict[str, str]]:
    """A page of ours, with the colors that all share put in, and the headers it is sent with."""
    folder = files("keepwarm.dashboard")
    colors = folder.joinpath("colors.css").read_bytes()
    html = folder.joinpath(name).read_bytes().replace(b"/* colors.css */", colors, 1)
    return html, {
        "Content-Security-Policy": content_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.blake2b(html, digest_size=12).hexdigest()}"',
    }


def content_policy(html: bytes) -> str:
    """What the page may do: run its own script, talk to its own server, nothing else."""
    scripts = re.findall(rb"<script>(.*?)</script>", html, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _number(text: str, *, most: float) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise RequestError(f"{text[:40]!r} isn't a number.") from error
    if not 0 <= value <= most:
        raise RequestError(f"{text[:40]} isn't between 0 and {most:g}.")
    return value


def _json(body: object) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
