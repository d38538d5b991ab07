"""One request through the gateway: admitted, tiered, planned, forwarded, proved.

`Proxy.handle` is the whole way of a request (the numbered steps of docs/architecture.md). Bytes of
a stream go to the client as they come; the reply is read for its counts once it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from keepwarm.core.anthropic import chat_request
from keepwarm.core.hygiene import told
from keepwarm.core.job import Job
from keepwarm.core.prompt import Api, Prompt, prompt_of
from keepwarm.core.reply import Reply, read_reply
from keepwarm.engine.http import Response
from keepwarm.engine.options import EXACT
from keepwarm.engine.static_end import static_body
from keepwarm.errors import EngineDownError, EngineError, KeepwarmError, RequestError
from keepwarm.gateway.asked import Asked, cleaned, cleaned_body
from keepwarm.gateway.dialect import OPENAI, Anthropic, Dialect
from keepwarm.gateway.dispatcher import Grant
from keepwarm.gateway.ending import tell_ended
from keepwarm.gateway.first_words import FirstWords, tool_names
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.tiering import HEADER, Tiered
from keepwarm.gateway.upstream import Fetched, forwarded, posted, read_whole, returned
from keepwarm.router import Escalation

log = logging.getLogger("keepwarm")

# How often a request whose engine died before it answered is planned again.
_RETRIES = 2
# A reader that is slower than the model must not hold the engine's slot: this much is buffered for
# it. A reply of 100,000 tokens as server-sent events is about 20 MB.
_WRITE_BUFFER_BYTES = 32 << 20
_BROKEN_OFF = (
    "The engine went away in the middle of this reply. It is being restarted; send the request "
    "again."
)


@dataclass(slots=True)
class Exchange:
    """One request on its way; what is known of it grows."""

    id: str
    asked: Asked
    received_s: float
    tiered: Tiered
    job: Job
    static: dict[str, Any] | None
    grant: Grant | None = None
    first_byte_s: float | None = None
    streamed: bool = False
    status: int = 0
    trouble: str = ""
    reply: Reply | None = None
    may_escalate: bool = False
    is_left: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told of what happened."""
        tier = self.tiered.tier.name if self.tiered.tier else "none"
        out = {"X-Keepwarm-Request-Id": self.id, HEADER: f"{tier}; {self.tiered.reason}"}
        if self.job.filled_tokens:
            # They were prefilled before the engine's own count of this reply began.
            out["X-Keepwarm-Filled"] = str(self.job.filled_tokens)
        if self.asked.rewrites:
            out["X-Keepwarm-Hygiene"] = told(self.asked.rewrites)
        if self.grant:
            route_s = self.job.arrived_s - self.received_s
            out["X-Keepwarm-Plan"] = self.grant.plan.source.value
            out["X-Keepwarm-Slot"] = str(self.grant.plan.slot)
            out["Server-Timing"] = ", ".join(
                f"{name};dur={seconds * 1e3:.2f}"
                for name, seconds in (
                    ("route", route_s),
                    ("queue", self.grant.queued_s),
                    ("restore", self.grant.prepared_s),
                )
            )
        return out


class Proxy:
    """Forwards planned requests (`handle`) and everything else (`pass_through`)."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def handle(self, request: web.Request, api: Api) -> web.StreamResponse:
        """Serve one request of a planned API."""
        namespace = self._runtime.keys.namespace(request.headers)
        body = decode_body(await request.read())
        asked = Asked(api, body, namespace, request.path_qs, request.headers)
        return await self._answer(cleaned(asked, self._runtime.hygiene), request)

    async def handle_messages(self, request: web.Request) -> web.StreamResponse:
        """Serve one request of Anthropic's API, over chat completions."""
        namespace = self._runtime.keys.namespace(request.headers)
        body = decode_body(await request.read())
        dialect = Anthropic(str(body.get("model", "")))
        path = "/v1/chat/completions"
        # Before its blocks are joined, so that a line is what the client meant as one.
        body, rewrites = cleaned_body(self._runtime.hygiene, "messages", body, request.headers)
        chat = chat_request(body)
        asked = Asked("chat", chat, namespace, path, request.headers, dialect, rewrites)
        return await self._answer(asked, request)

    async def answer(self, asked: Asked) -> web.StreamResponse:
        """Serve a request of Keepwarm's own, like one that came by HTTP.

        Its body must not ask for a stream.

        Raises:
            KeepwarmError: as a client would be told.
        """
        return await self._answer(cleaned(asked, self._runtime.hygiene), None)

    async def _answer(self, asked: Asked, request: web.Request | None) -> web.StreamResponse:
        received_s = time.monotonic()
        runtime = self._runtime
        api, body, namespace = asked.api, asked.body, asked.namespace
        runtime.metrics.rewritten(asked.rewrites)
        await runtime.admitted()
        tiered = runtime.router.tier(api, body, asked.headers.get(HEADER), namespace)
        while True:
            exchange = self._exchange(asked, tiered, received_s)
            try:
                return await self._serve(request, exchange)
            except KeepwarmError as error:
                exchange.trouble = error.kind
                error.headers = exchange.headers
                raise
            except _EscalatedError as escalated:
                exchange.trouble = "escalated"
                # A tier was too small and nothing has been sent: once more, one tier up.
                runtime.metrics.escalated(
                    tier=tiered.tier.name if tiered.tier else "none",
                    reason=escalated.escalation.cause.value,
                )
                up = runtime.router.escalated(api, body, tiered, escalated.escalation, namespace)
                assert up is not None
                tiered = up
            finally:
                tell_ended(runtime, exchange)

    async def _serve(self, request: web.Request | None, exchange: Exchange) -> web.StreamResponse:
        """Get a slot for an exchange, forward it, and give the slot back."""
        runtime = self._runtime
        exchange.grant = await runtime.dispatcher.acquire(exchange.job, exchange.static)
        try:
            for attempt in range(_RETRIES + 1):
                try:
                    return await self._forward(request, exchange)
                except EngineDownError:
                    if attempt == _RETRIES:
                        raise
                    await runtime.look_at_engine()
                    exchange.grant = await runtime.dispatcher.retry(exchange.job)
            raise AssertionError("unreachable")
        finally:
            # Whatever happened, the slot is given back; once `_ended` has done so this does
            # nothing.
            if not exchange.is_left:
                runtime.dispatcher.finish(exchange.job, counts=None, reply=None)

    def _exchange(self, asked: Asked, tiered: Tiered, received_s: float) -> Exchange:
        runtime = self._runtime
        prompt = self._prompt(asked, tiered)
        now_s = time.monotonic()
        priority = asked.priority
        # A batch has hours; who sent it decides how long to wait.
        wait_s = math.inf if priority else runtime.settings.server.queue_timeout_s
        limit = tiered.body.get("max_tokens") or tiered.body.get("max_completion_tokens")
        replies = tiered.body.get("n_cmpl", tiered.body.get("n"))
        # It needs a slot for each; more than there are it refuses, before it looks at any.
        slots = len(self._runtime.dispatcher.scheduler.slots)
        is_alone = isinstance(replies, int) and 1 < replies <= slots
        # State computed with adapters of a request's own isn't the model's: the store, which knows
        # tokens by their ids, would take the one for the other.
        is_savable = not tiered.body.get("lora")
        job = Job(
            id=uuid.uuid4().hex[:16],
            namespace=asked.namespace,
            prompt=prompt,
            arrived_s=now_s,
            deadline_s=now_s + wait_s,
            reply_tokens=min(limit, 512) if isinstance(limit, int) and limit > 0 else 512,
            priority=priority,
            is_final=priority > 0 or asked.is_infill,
            static_shared=prompt.is_static_shared,
            is_alone=is_alone,
            is_savable=is_savable,
        )
        fills = prompt.static and is_savable
        static = static_body(asked.api, tiered.body) if fills else None
        exchange = Exchange(job.id, asked, received_s, tiered, job, static)
        exchange.may_escalate = (
            runtime.settings.tiers.escalate
            and tiered.tier is not None
            and tiered.reason != "explicit"
            and runtime.tiers.next_up(tiered.tier.name) is not None
        )
        return exchange

    def _prompt(self, asked: Asked, tiered: Tiered) -> Prompt:
        return prompt_of(
            asked.api,
            tiered.shaping,
            fingerprint=self._runtime.fingerprint,
            namespace=asked.namespace,
            shared_segments=tiered.shared_segments,
            ends=asked.ends(tiered),
        )

    async def _forward(self, request: web.Request | None, exchange: Exchange) -> web.StreamResponse:
        """Forward to the granted slot and give the slot back when the engine has ended.

        Raises:
            EngineDownError: no byte of an answer came; nothing was sent to the client.
        """
        assert exchange.grant
        body = {**exchange.tiered.body, "id_slot": exchange.grant.plan.slot}
        if not exchange.asked.is_infill:
            # Nobody saves an infill, and editors count on moved chunks of it.
            body |= EXACT
        body.setdefault("cache_prompt", True)
        if exchange.grant.plan.discard:
            body["cache_prompt"] = False
        asked = exchange.asked
        gathers = asked.api == "chat" and not body.get("stream")
        if gathers:
            # A stream ends when its client leaves, a whole reply doesn't: see `core.gathered`.
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        sent = posted(self._runtime.client.http, asked.path, body, forwarded(asked.headers))
        if not body.get("stream"):
            return self._whole(exchange, await self._outlasting(exchange, sent))
        async with sent as upstream:
            if gathers or not upstream.is_stream:
                return self._whole(exchange, await read_whole(upstream))
            assert request, "only a client's request may stream"
            return await self._stream(request, exchange, upstream)

    async def _outlasting(
        self, exchange: Exchange, sent: AbstractAsyncContextManager[Response]
    ) -> Fetched:
        """Have a whole reply; if the client leaves, the slot is kept until the engine is done.

        The engine computes to the end for nobody. Given back before that, the slot would be
        planned for a request that only waited in it.
        """

        async def read() -> Fetched:
            async with sent as upstream:
                return await read_whole(upstream)

        reading = asyncio.ensure_future(read())
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            if not reading.cancelled():
                exchange.is_left = True
                self._runtime.supervise(self._left(exchange, reading))
            raise

    async def _left(self, exchange: Exchange, reading: asyncio.Future[Fetched]) -> None:
        reply = Reply(None, None)
        try:
            fetched = await reading
            if fetched.status == 200:
                reply = read_reply(fetched.raw, streamed=False)
        except EngineError as error:
            log.debug("%s: the reply that nobody waited for failed: %s", exchange.id, error)
        finally:
            self._runtime.dispatcher.finish(exchange.job, counts=reply.counts, reply=reply.segment)

    def _whole(self, exchange: Exchange, fetched: Fetched) -> web.StreamResponse:
        exchange.first_byte_s = fetched.first_byte_s
        if fetched.status == 200:
            self._escalate(exchange, fetched.raw, complete=True)
        self._ended(exchange, fetched.raw, status=fetched.status)
        raw = exchange.asked.dialect.whole(fetched.raw, status=fetched.status)
        headers = fetched.headers | exchange.headers
        return web.Response(body=raw, status=fetched.status, headers=headers)

    async def _stream(
        self, request: web.Request, exchange: Exchange, upstream: Response
    ) -> web.StreamResponse:
        exchange.streamed = True
        # Made while the engine computes; sent when it has said something.
        response = _StreamResponse(
            status=upstream.status, headers=returned(upstream.headers) | exchange.headers
        )
        chunks = [await upstream.read_some()]
        if not chunks[0]:
            raise EngineDownError("The engine closed the stream before its first byte.")
        while not self._escalate(exchange, b"".join(chunks), complete=not chunks[-1]):
            chunks.append(await upstream.read_some())
        exchange.first_byte_s = time.monotonic()
        await response.prepare(request)
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        translator = exchange.asked.dialect.stream()
        await response.write(translator.feed(b"".join(chunks)))
        try:
            while chunk := await upstream.read_some():
                chunks.append(chunk)
                await response.write(translator.feed(chunk))
            await response.write(translator.end())
        except EngineDownError:
            self._runtime.suspect_engine()
            self._runtime.metrics.failed("engine_died")
            exchange.trouble = "engine_died"
            await response.write(
                exchange.asked.dialect.error_event(_BROKEN_OFF, kind="upstream_error", status=502)
            )
            await response.write_eof()
        else:
            try:
                # First, since the client waits for it. What it asks next is read after this task
                # has given the slot back.
                await response.write_eof()
            finally:
                self._ended(exchange, b"".join(chunks), status=upstream.status)
        return response

    def _escalate(self, exchange: Exchange, raw: bytes, *, complete: bool) -> bool:
        """Whether a reply's first bytes may be sent.

        Raises:
            _EscalatedError: they say that the tier was too small.
        """
        tier = exchange.tiered.tier
        if tier is None or not tier.need_more or not exchange.may_escalate:
            return True
        watch = FirstWords(
            tier=tier.name,
            tools=tool_names(exchange.tiered.body),
            streamed=exchange.streamed,
        )
        decided, escalation = watch.judge(raw, complete=complete)
        if escalation:
            raise _EscalatedError(escalation)
        return decided

    def _ended(self, exchange: Exchange, raw: bytes, *, status: int) -> None:
        """Prove the plan by the reply's counts, and give the slot back."""
        reply = read_reply(raw, streamed=exchange.streamed) if status == 200 else Reply(None, None)
        counts = reply.counts
        exchange.status, exchange.reply = status, reply
        # A 4xx was refused before the engine looked at the slot, and so is what it can't do at all.
        touched = not (400 <= status < 500 or status == 501)
        self._runtime.dispatcher.finish(
            exchange.job, counts=counts, reply=reply.segment, touched=touched
        )
        if counts is None or exchange.grant is None or exchange.first_byte_s is None:
            self._runtime.metrics.failed(f"engine_{status}" if status != 200 else "no_counts")
            return
        ttft_s = exchange.first_byte_s - exchange.received_s
        self._runtime.proved(
            exchange.job, exchange.grant.plan, counts, ttft_s=ttft_s, tier=exchange.tiered
        )

    async def pass_through(self, request: web.Request) -> web.StreamResponse:
        """Forward any other request unchanged, body and reply streamed."""
        runtime = self._runtime
        runtime.keys.namespace(request.headers)
        await runtime.admitted()
        sent = runtime.client.http.request(
            request.method,
            request.path_qs,
            headers=forwarded(request.headers, is_unchanged=True),
            body=await request.read() if request.body_exists else None,
        )
        with closing(await sent) as upstream:
            response = web.StreamResponse(
                status=upstream.status, headers=returned(upstream.headers, is_unchanged=True)
            )
            await response.prepare(request)
            while chunk := await upstream.read_some():
                await response.write(chunk)
            await response.write_eof()
            return response


class _StreamResponse(web.StreamResponse):
    """Its headers go with the first piece of its body, as aiohttp does it for whole responses.

    Sent before it they wake the client, which on a busy machine then takes the core from us.
    """

    _send_headers_immediately = False


class _EscalatedError(Exception):
    """A reply's first words asked for a larger tier; nothing was sent to the client."""

    def __init__(self, escalation: Escalation) -> None:
        super().__init__(escalation.cause.value)
        self.escalation = escalation


def error_response(error: KeepwarmError, dialect: Dialect = OPENAI) -> web.Response:
    """An error in the client's dialect, with `Retry-After` where a retry helps."""
    return web.Response(
        body=dialect.error(str(error), kind=error.kind, status=error.status),
        status=error.status,
        content_type="application/json",
        headers={"Retry-After": "5"} if error.retry else {},
    )


def decode_body(raw: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        RequestError: it isn't one.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The request body isn't valid JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError("The request body must be a JSON object.")
    return body
