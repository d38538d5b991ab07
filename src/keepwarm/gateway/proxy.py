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
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, closing
from dataclasses import replace
from functools import partial

import msgspec
from aiohttp import web

from keepwarm.api.bodies import check_body
from keepwarm.api.dialect import StreamTranslator, dialect_of
from keepwarm.api.mending import decode_body
from keepwarm.api.reading import can_gather, opening_of
from keepwarm.api.routes import request_headers
from keepwarm.core.client_name import agent_of
from keepwarm.core.job import Job
from keepwarm.core.prompt import prompt_of
from keepwarm.core.reply import Reply, read_reply
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.life import Life
from keepwarm.deployment.model import Model
from keepwarm.engine.http import Response
from keepwarm.engine.options import EXACT
from keepwarm.engine.static_end import rendered_from, static_body
from keepwarm.errors import (
    EngineCrashedError,
    EngineDownError,
    EngineError,
    EngineUnreachableError,
    KeepwarmError,
)
from keepwarm.gateway.client_request import COUNTED, MESSAGES, PLANNED, ClientRequest, asked_of
from keepwarm.gateway.door import namespace_of, path_of, read_body
from keepwarm.gateway.ending import tell_ended
from keepwarm.gateway.exchange import Exchange
from keepwarm.gateway.first_words import FirstWords, tool_names
from keepwarm.gateway.fits import bounded, check_prompt, check_text, reply_limit
from keepwarm.gateway.opening import Opening
from keepwarm.gateway.progress import tell_fill
from keepwarm.gateway.upstream import (
    PROGRESS,
    WholeReply,
    corrected_blame,
    is_quiet,
    post_body,
    read_whole,
    reply_headers,
)
from keepwarm.router import Escalation
from keepwarm.tiers.tiering import HEADER, TieredRequest

log = logging.getLogger("keepwarm")

_CHAT_PATH = "/v1/chat/completions"
# How often a request whose engine died before it answered is planned again.
_RETRIES = 2
# How the reply to a streamed request begins.
_OPENING = web.RequestKey("opening", Opening)
_BROKEN_OFF = (
    "The engine went away or Keepwarm was stopped in the middle of this reply; send the request "
    "again."
)
_CRASHES = (
    "The engine has died {} times over this request. It isn't sent again; the engine's log says "
    'more (log.level = "debug").'
)


class Proxy:
    """Forwards planned requests (`handle`) and everything else (`pass_through`)."""

    def __init__(self, life: Life) -> None:
        self._life = life

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one request of a planned API, whichever it is, or count its tokens."""
        path = path_of(request)
        if path in COUNTED:
            kind = COUNTED[path]
            return await self._counted(await self._read(request, kind, _CHAT_PATH), kind)
        is_messages = path == MESSAGES
        kind = "messages" if is_messages else PLANNED[path]
        asked = await self._read(request, kind, _CHAT_PATH if is_messages else path)
        return await self._opened(asked, request, kind)

    async def _read(self, request: web.Request, kind: str, path: str) -> ClientRequest:
        """A client's request as it came; `path` is the engine's, `kind` the client's API."""
        body = decode_body(await read_body(request))
        check_body(kind, body)
        self._life.check_model(body.get("model"))
        dialect = dialect_of(path_of(request), model=str(body.get("model", "")))
        namespace = namespace_of(request)
        return ClientRequest("completion", body, namespace, path, request.headers, dialect)

    async def _counted(self, asked: ClientRequest, kind: str) -> web.StreamResponse:
        """Count the tokens of a request as it would be sent: with its tier, and cleaned."""
        model, asked = self._addressed(asked)
        with await self._life.admitted(model) as deployment:
            asked = asked_of(asked, self._life.hygiene, deployment.takes, kind=kind)
            tiered = deployment.router.tier(
                asked.api, asked.body, asked.headers.get(HEADER), asked.namespace
            )
            tokens = await deployment.client.count(tiered.chat)
        return web.Response(body=asked.dialect.counted(tokens), content_type="application/json")

    async def _opened(
        self, asked: ClientRequest, request: web.Request, kind: str
    ) -> web.StreamResponse:
        """Answer a client; a stream that doesn't begin soon is opened and kept alive meanwhile."""
        if not asked.body.get("stream"):
            return await self._answer(asked, request, kind)
        ping_s = self._life.settings.server.ping_s
        opening = request[_OPENING] = Opening(request, asked.dialect, ping_s=ping_s)
        try:
            return await opening.replaced(await self._answer(asked, request, kind))
        except KeepwarmError as error:
            response = await opening.refused(error)
            if response is None:
                raise
            self._life.metrics.failed(error.kind)
            return response
        finally:
            opening.close()

    async def answer(self, asked: ClientRequest) -> web.StreamResponse:
        """Serve a request of Keepwarm's own, like one that came by HTTP.

        Its body must not ask for a stream.

        Raises:
            KeepwarmError: as a client would be told.
        """
        return await self._answer(asked, None)

    async def _answer(
        self, asked: ClientRequest, request: web.Request | None, kind: str = ""
    ) -> web.StreamResponse:
        received_s = time.monotonic()
        model, asked = self._addressed(asked)
        with await self._life.admitted(model, is_batch=asked.priority > 0) as deployment:
            loaded_s = time.monotonic() - received_s
            asked = asked_of(asked, self._life.hygiene, deployment.takes, kind=kind)
            return await self._answer_at(
                deployment, asked, request, received_s=received_s, loaded_s=loaded_s
            )

    def _addressed(self, asked: ClientRequest) -> tuple[Model, ClientRequest]:
        """The model that a request is for, and the request as that model's deployment is asked."""
        model, name = self._life.models.addressed(asked.body.get("model"))
        if name is None:
            return model, asked
        return model, replace(asked, body={**asked.body, "model": name})

    async def _answer_at(
        self,
        deployment: Deployment,
        asked: ClientRequest,
        request: web.Request | None,
        *,
        received_s: float,
        loaded_s: float,
    ) -> web.StreamResponse:
        """Answer a request at the deployment of its model, for which it has waited `loaded_s`."""
        api, body, namespace = asked.api, asked.body, asked.namespace
        deployment.metrics.rewritten(asked.rewrites)
        await check_text(deployment, asked)
        tiered = deployment.router.tier(api, body, asked.headers.get(HEADER), namespace)
        while True:
            exchange = self._exchange(deployment, asked, tiered, received_s)
            exchange.loaded_s = loaded_s
            if request is not None and (opening := request.get(_OPENING)):
                opening.known = partial(_known, exchange)
                tell_fill(deployment, exchange, opening)
            try:
                return await self._serve(request, exchange)
            except KeepwarmError as error:
                exchange.trouble = error.kind
                error.headers = exchange.headers
                raise
            except _EscalatedError as escalated:
                exchange.trouble = "escalated"
                # A tier was too small and nothing has been sent: once more, one tier up.
                deployment.metrics.escalated(
                    tier=tiered.tier.name if tiered.tier else "none",
                    reason=escalated.escalation.cause.value,
                )
                up = deployment.router.escalated(api, body, tiered, escalated.escalation, namespace)
                assert up is not None
                tiered = up
            finally:
                tell_ended(deployment, exchange)

    async def _serve(self, request: web.Request | None, exchange: Exchange) -> web.StreamResponse:
        """Get a slot for an exchange, forward it, and give the slot back."""
        deployment = exchange.deployment
        await check_prompt(deployment, exchange.job)
        exchange.grant = await deployment.dispatcher.acquire(exchange.job, exchange.static)
        try:
            return await self._forward_again(request, exchange)
        finally:
            # Whatever happened, the slot is given back; once `_ended` has done so this does
            # nothing.
            if not exchange.is_left:
                deployment.dispatcher.finish(exchange.job, counts=None, reply=None)

    async def _forward_again(
        self, request: web.Request | None, exchange: Exchange
    ) -> web.StreamResponse:
        """Forward, and again if no byte of an answer came, but not for ever.

        1. The engine lives: the connection broke, or it was loading. Sent again.
        2. It died, and served others too: any of them may be why. Those go again one at a time.
        3. It died for the second time, and served nobody else: this request is why.

        Raises:
            EngineCrashedError: as in 3, or the engine has died under each attempt.
            EngineDownError: no attempt was answered; or Keepwarm is stopping.
        """
        deployment, job = exchange.deployment, exchange.job
        deaths = 0
        async with AsyncExitStack() as suspected:
            for attempt in range(_RETRIES + 1):
                try:
                    return await self._forward(request, exchange)
                except EngineDownError as error:
                    await deployment.look_at_engine()
                    was_seen = not isinstance(error, EngineUnreachableError)
                    was_alone = deployment.was_alone_at_death(job.id) if was_seen else None
                    deaths += was_alone is not None
                    if deaths > _RETRIES or (was_alone and deaths > 1):
                        deployment.metrics.failed("request_crashed")
                        raise EngineCrashedError(_CRASHES.format(deaths)) from error
                    if attempt == _RETRIES:
                        raise
                    if deaths == 1 and was_alone is not None:
                        await suspected.enter_async_context(deployment.suspects)
                    await deployment.admitted()
                    exchange.grant = await deployment.dispatcher.retry(job)
        raise AssertionError("unreachable")

    def _exchange(
        self,
        deployment: Deployment,
        asked: ClientRequest,
        tiered: TieredRequest,
        received_s: float,
    ) -> Exchange:
        prompt = prompt_of(
            tiered.shaping,
            fingerprint=deployment.fingerprint,
            namespace=asked.namespace,
            shared_segments=tiered.shared_segments,
            ends=asked.ends(tiered),
        )
        now_s = time.monotonic()
        priority = asked.priority
        # A batch has hours; who sent it decides how long to wait.
        wait_s = math.inf if priority else deployment.settings.server.queue_timeout_s
        replies = tiered.body.get("n_cmpl", tiered.body.get("n"))
        # It needs a slot for each; more than there are it refuses, before it looks at any.
        slots = len(deployment.dispatcher.scheduler.slots)
        replies = replies if isinstance(replies, int) and 1 < replies <= slots else 1
        # State computed with adapters of a request's own isn't the model's: the store, which knows
        # tokens by their ids, would take the one for the other.
        is_savable = not tiered.body.get("lora")
        job = Job(
            id=uuid.uuid4().hex[:16],
            namespace=asked.namespace,
            prompt=prompt,
            arrived_s=now_s,
            deadline_s=now_s + wait_s,
            reply_tokens=reply_limit(tiered.body),
            priority=priority,
            is_final=priority > 0 or asked.is_infill,
            static_shared=prompt.is_static_shared,
            is_alone=replies > 1,
            replies=replies,
            is_savable=is_savable,
            # Matched by tokens it would be taken for the model's own, or start from that.
            chat=rendered_from(tiered.chat) if is_savable and not asked.is_infill else None,
            ids=prompt.ids if is_savable else None,
            reuses=tiered.body.get("cache_prompt") is not False,
            agent=agent_of(asked.headers.get("user-agent", "")),
        )
        fills = prompt.static and is_savable and job.reuses
        static = static_body(tiered.chat) if fills else None
        exchange = Exchange(job.id, deployment, asked, received_s, tiered, job, static)
        exchange.may_escalate = (
            deployment.settings.tiers.escalate
            and tiered.tier is not None
            and tiered.reason != "explicit"
            and deployment.tiers.next_up(tiered.tier.name) is not None
        )
        return exchange

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
        body |= bounded(body, exchange.grant.plan.reply_tokens)
        if exchange.grant.plan.discard:
            body["cache_prompt"] = False
        asked = exchange.asked
        gathers = can_gather(asked.api, body) and not body.get("stream")
        if gathers:
            # A stream ends when its client leaves, a whole reply doesn't: see `core.gathered`.
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        sent = post_body(
            exchange.deployment.client.http, asked.path, body, request_headers(asked.headers)
        )
        if not body.get("stream"):
            return self._whole(exchange, await self._outlasting(exchange, sent))
        async with sent as upstream:
            if gathers or not upstream.is_stream:
                opening = opening_of(exchange.tiered.chat)
                return self._whole(exchange, await read_whole(upstream, opening=opening))
            assert request, "only a client's request may stream"
            return await self._stream(request, exchange, upstream)

    async def _outlasting(
        self, exchange: Exchange, sent: AbstractAsyncContextManager[Response]
    ) -> WholeReply:
        """Have a whole reply; if the client leaves, the slot is kept until the engine is done.

        The engine computes to the end for nobody. Given back before that, the slot would be
        planned for a request that only waited in it.
        """

        async def read() -> WholeReply:
            async with sent as upstream:
                return await read_whole(upstream)

        reading = asyncio.ensure_future(read())
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            if not reading.cancelled():
                exchange.is_left = True
                exchange.deployment.supervise(self._left(exchange, reading))
            raise

    async def _left(self, exchange: Exchange, reading: asyncio.Future[WholeReply]) -> None:
        reply = Reply(None, None)
        try:
            fetched = await reading
            if fetched.status == 200:
                reply = read_reply(fetched.raw, streamed=False)
        except EngineError as error:
            log.debug("%s: the reply that nobody waited for failed: %s", exchange.id, error)
        finally:
            exchange.deployment.dispatcher.finish(
                exchange.job, counts=reply.counts, reply=reply.segment
            )

    def _whole(self, exchange: Exchange, fetched: WholeReply) -> web.StreamResponse:
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
        opening = request[_OPENING]
        opening.engine_headers = reply_headers(upstream.headers)
        translator = exchange.asked.dialect.stream()
        chunks = [await self._first_words(upstream, opening, translator)]
        while not self._escalate(exchange, b"".join(chunks), complete=not chunks[-1]):
            chunks.append(await upstream.read_some())
        exchange.first_byte_s = time.monotonic()
        await opening.write(translator.feed(b"".join(chunks)))
        try:
            while chunk := await upstream.read_some():
                chunks.append(chunk)
                await opening.write(translator.feed(chunk))
            await opening.write(translator.end())
        except EngineDownError:
            exchange.deployment.suspect_engine()
            self._life.metrics.failed("engine_died")
            exchange.trouble = "engine_died"
            return await opening.break_off(_BROKEN_OFF, kind="upstream_error", status=502)
        except (asyncio.CancelledError, ConnectionError):
            # A client that knows its last event leaves without waiting for the stream's end. The
            # engine has told its counts by then, and is done.
            if read_reply(b"".join(chunks), streamed=True).counts:
                self._ended(exchange, b"".join(chunks), status=upstream.status)
            raise
        try:
            # First, since the client waits for it. What it asks next is read after this task
            # has given the slot back.
            return await opening.finish()
        finally:
            self._ended(exchange, b"".join(chunks), status=upstream.status)

    async def _first_words(
        self, upstream: Response, opening: Opening, translator: StreamTranslator
    ) -> bytes:
        """A stream's bytes from its first words on. The engine's pings aren't: we have our own.

        Raises:
            EngineDownError: none came.
        """
        while some := await upstream.read_some():
            if not is_quiet(some):
                return some
            if PROGRESS in some:
                await opening.write(translator.feed(some))
        raise EngineDownError("The engine closed the stream before its first byte.")

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
        deployment = exchange.deployment
        deployment.dispatcher.finish(
            exchange.job, counts=counts, reply=reply.segment, touched=touched
        )
        deployment.ahead.note(exchange.job, reply)
        if counts is None or exchange.grant is None or exchange.first_byte_s is None:
            deployment.metrics.failed(f"engine_{status}" if status != 200 else "no_counts")
            return
        ttft_s = exchange.first_byte_s - exchange.received_s
        deployment.prover.proved(
            exchange.job, exchange.grant.plan, counts, ttft_s=ttft_s, tier=exchange.tiered
        )

    async def pass_through(self, request: web.Request) -> web.StreamResponse:
        """Forward a request that touches no slot, body and reply as they are."""
        body = await read_body(request) if request.body_exists else None
        meant = self._meant(request, body)
        stay = await self._life.glanced() if meant is None else None
        with stay or await self._life.admitted(meant) as deployment:
            return await self._passed(request, body, deployment)

    def _meant(self, request: web.Request, body: bytes | None) -> Model | None:
        """Of several models the one that a request names that is passed on as it is."""
        if not self._life.models.several:
            return None
        name: object = request.query.get("model")
        if body and not name:
            try:
                name = msgspec.json.decode(body, type=dict).get("model")
            except msgspec.MsgspecError:
                return None
        return self._life.models.addressed(name)[0] if name else None

    async def _passed(
        self, request: web.Request, body: bytes | None, deployment: Deployment
    ) -> web.StreamResponse:
        query = request.rel_url.raw_query_string
        sent = deployment.client.http.request(
            request.method,
            path_of(request) + (f"?{query}" if query else ""),
            headers=request_headers(request.headers, is_unchanged=True),
            body=body,
        )
        with closing(await sent) as upstream:
            if upstream.status >= 400 and upstream.is_json:
                status, raw = corrected_blame(upstream.status, await upstream.read())
                raw = dialect_of(path_of(request)).whole(raw, status=status)
                return web.Response(body=raw, status=status, content_type="application/json")
            response = web.StreamResponse(
                status=upstream.status, headers=reply_headers(upstream.headers, is_unchanged=True)
            )
            await response.prepare(request)
            while chunk := await upstream.read_some():
                await response.write(chunk)
            await response.write_eof()
            return response


def _known(exchange: Exchange) -> Mapping[str, str]:
    return exchange.headers


class _EscalatedError(Exception):
    """A reply's first words asked for a larger tier; nothing was sent to the client."""

    def __init__(self, escalation: Escalation) -> None:
        super().__init__(escalation.cause.value)
        self.escalation = escalation
