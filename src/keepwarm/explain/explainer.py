"""Explains every finished request, off the event loop, and tells who wants to know.

Theory of operation. The event loop hands over what it knows at a request's end (`ended`, some
microseconds) and goes on. One thread takes these in order: it compares the prompt with the nearest
earlier one of its namespace, names the cause of what was cold, writes the record, the log line and
the trace, and remembers the prompt for the next comparison. The page's listeners are told on the
event loop, and only if there are any.

Questions (`get`, `latest`) go through the same thread, so an answer knows of all that ended before
it was asked.

Invariants:
- Prompts are compared within one namespace and with the tiers, nothing else.
- Text of prompts stays in this thread's memory; it goes into records only if the settings say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keepwarm.core.reply import Reply
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.explain.difference import Cause, first_difference, sent_difference
from keepwarm.explain.explanation import (
    ExplainedFacts,
    Explanation,
    Nearest,
    explain,
    tokens_at,
    tolerance,
)
from keepwarm.explain.history import FILE_NAME, History, PastRequest, Totals
from keepwarm.explain.parts import Parts, chars_before, parts_of
from keepwarm.explain.recent import Recent, Remembered
from keepwarm.explain.record import EndedRequest, record_of, without_text
from keepwarm.logs import log_request
from keepwarm.worker import Worker

log = logging.getLogger("keepwarm")

T = TypeVar("T")

# What may wait when the thread is behind; beyond this, requests go unexplained rather than pile up
# with their bodies in memory.
_BACKLOG = 1000
_BACKLOG_CHARS = 64 << 20
# What has ended is on disk this much later, if nobody asks for it before.
_WRITE_S = 0.5
# A slot is given back a moment before its request is over. Not more: a small model answers all that
# came in one moment within some tens of milliseconds.
_GRACE_S = 0.005


@dataclass(frozen=True, slots=True)
class Identity:
    """The deployment that answers. `described` says what its fingerprint is made of."""

    fingerprint: str
    described: dict[str, str]
    cuttable: bool


@dataclass(frozen=True, slots=True)
class _Opened:
    """A deployment since the wall clock's `at_s`."""

    identity: Identity
    tiers: Sequence[Remembered]
    at_s: float


class Sink(Protocol):
    """Who is told of each request, on the explaining thread: metrics, traces."""

    def explained(self, ended: EndedRequest, record: dict[str, Any]) -> None:
        """A request was explained."""


class Explainer:
    """See the module. What ends before `open` is forgotten."""

    def __init__(self, *, keeps_text: bool, sinks: Sequence[Sink] = ()) -> None:
        self.on_record: Callable[[str, dict[str, Any]], None] | None = None
        self._keeps_text = keeps_text
        self._sinks = sinks
        self._worker = Worker("explain", failure="a request couldn't be explained")
        self._room = threading.BoundedSemaphore(_BACKLOG)
        # Written by the event loop, and by this thread: each adds up its own.
        self._left_chars = self._explained_chars = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._history: History | None = None
        self._identity = _Opened(Identity("", {}, cuttable=True), (), 0.0)
        # By the fingerprint: models take turns, and what has ended is explained later.
        self._opened: dict[str, _Opened] = {}
        self._recent = Recent()
        self._namespaces: set[str] = set()

    async def open(self, directory: Path, identity: Identity, tiers: Sequence[Remembered]) -> None:
        """Open the history and begin to explain.

        Args:
            directory: where the history lies.
            identity: of the deployment.
            tiers: what everyone's prompts may be compared with.
        """
        self._loop = asyncio.get_running_loop()
        opened = _Opened(identity, tiers, time.time())

        def begin() -> None:
            history = self._history or History(
                directory / FILE_NAME, keeps_text=self._keeps_text, without_text=without_text
            )
            self._identity = self._opened[identity.fingerprint] = opened
            history.describe(identity.fingerprint, identity.described)
            self._recent.share([tier for one in self._opened.values() for tier in one.tiers])
            self._history = history

        await self._ask(begin)

    async def close(self) -> None:
        """Explain what has ended, and close the history."""

        def end() -> None:
            history, self._history = self._history, None
            if history:
                history.close()

        if self._loop is not None:
            self._loop = None
            await self._ask(end)
        self._worker.close()

    def ended(self, ended: EndedRequest) -> None:
        """A request has ended. Returns at once."""
        chars = ended.prompt.chars
        if self._left_chars - self._explained_chars + chars > _BACKLOG_CHARS:
            return
        if self._loop is not None and self._room.acquire(blocking=False):
            self._left_chars += chars
            self._worker.leave(self._explain, ended)

    async def settled(self) -> None:
        """Wait until all that has ended is explained and counted."""
        await self._read(lambda _: None, None)

    async def get(self, request_id: str, *, namespace: str) -> dict[str, Any] | None:
        """One request's record; `last` is the latest. None if it isn't there."""

        def read(history: History) -> dict[str, Any] | None:
            if request_id == "last":
                found = history.latest(namespace=namespace, limit=1)
                return found[0] if found else None
            return history.get(request_id, namespace=namespace)

        return await self._read(read, None)

    async def latest(
        self,
        *,
        namespace: str,
        limit: int,
        before_s: float | None = None,
        cause: str | None = None,
    ) -> list[dict[str, Any]]:
        """Records, the latest first."""

        def read(history: History) -> list[dict[str, Any]]:
            return history.latest(namespace=namespace, limit=limit, before_s=before_s, cause=cause)

        return await self._read(read, [])

    async def totals(self, *, namespace: str) -> tuple[Totals, Totals]:
        """Sums of today and of all days."""

        def read(history: History) -> tuple[Totals, Totals]:
            today = history.totals(namespace=namespace, day=_day(time.time()))
            return today, history.totals(namespace=namespace)

        return await self._read(read, (Totals(), Totals()))

    async def forget(self, namespace: str) -> int | None:
        """Remove all of one namespace; returns how many requests, None if that can't be now."""
        self._namespaces.discard(namespace)

        def forget(history: History) -> int | None:
            self._recent.forget(namespace)
            return history.forget(namespace)

        return await self._read(forget, None)

    async def _read(self, read: Callable[[History], T], otherwise: T) -> T:
        if self._loop is None:
            return otherwise
        return await self._ask(lambda: read(self._history) if self._history else otherwise)

    async def _ask(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._worker.submit(work))

    def _explain(self, ended: EndedRequest) -> None:
        self._room.release()
        self._explained_chars += ended.prompt.chars
        history = self._history
        if history is None:
            return
        parts = parts_of(ended.body)
        digests = [mark.digest for mark in ended.prompt.marks]
        opening = _opening(parts, key=history.salt)
        like: Remembered | None = None
        told: Explanation | None = None
        if ended.counts is not None and ended.plan is not None:
            like = self._recent.nearest(
                digests, parts, namespace=ended.namespace, before_s=ended.at_s + _GRACE_S
            )
            told = explain(self._facts(ended, history, parts, like, opening))
            self._remember(ended, parts, digests, like)
        record = record_of(ended, told, (like.id, ended.at_s - like.at_s) if like else None)
        if not self._keeps_text:
            record = without_text(record)
        if history.is_written:
            self._write_soon(history)
        fingerprint = self._of(ended).identity.fingerprint
        history.add(_entry(ended, record, fingerprint, opening))
        log_request(record)
        for sink in self._sinks:
            sink.explained(ended, record)
        loop = self._loop
        if loop is not None and self.on_record is not None:
            loop.call_soon_threadsafe(self.on_record, ended.namespace, record)

    def _write_soon(self, history: History) -> None:
        """Have it written on this thread, together with what comes until then."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(
                loop.call_later, _WRITE_S, lambda: self._submit(history.write)
            )

    def _submit(self, work: Callable[[], None]) -> None:
        if self._loop is not None:  # else it is closed, and written
            self._worker.submit(work)

    def _facts(
        self,
        ended: EndedRequest,
        history: History,
        parts: Parts,
        like: Remembered | None,
        opening: bytes,
    ) -> ExplainedFacts:
        counts, plan = ended.counts, ended.plan
        assert counts
        assert plan
        nearest: Nearest | None = None
        agrees = reach = 0
        if like is not None:
            difference = first_difference(like.parts, parts)
            # Looked for only where the engine found less than what is canonically there.
            is_short = plan.reuse_tokens > counts.cached
            sent = sent_difference(like.parts, parts) if is_short else None
            nearest = Nearest(
                difference.hashed(history.salt) if difference else None,
                sent.hashed(history.salt) if sent else None,
                reasoned=like.reasoned,
                same_engine=like.engine in (ended.engine, None),
            )
            agrees = _agrees_tokens(ended, parts, like, nearest)
            reach = _reach_tokens(ended, nearest, agrees)
        moved, known = self._before(ended, history, opening)
        return ExplainedFacts(
            source=plan.source,
            cached_tokens=counts.cached,
            prefilled_tokens=counts.prefilled,
            filled_tokens=ended.filled_tokens,
            planned_tokens=plan.reuse_tokens,
            agrees_tokens=agrees,
            reach_tokens=reach,
            nearest=nearest,
            moved=moved,
            known=known,
            is_new_namespace=self._is_new(ended.namespace, history),
            failed_restore=ended.failed_restore,
            cuttable=self._of(ended).identity.cuttable,
        )

    def _of(self, ended: EndedRequest) -> _Opened:
        """The deployment that answered; the latest where a request doesn't say."""
        return self._opened.get(ended.fingerprint, self._identity)

    def _is_new(self, namespace: str, history: History) -> bool:
        if namespace in self._namespaces:
            return False
        self._namespaces.add(namespace)
        return not history.knows(namespace)

    def _before(
        self, ended: EndedRequest, history: History, opening: bytes
    ) -> tuple[tuple[str, ...] | None, Cause | None]:
        """What is on record of the last prompt that began like this (see `ExplainedFacts`)."""
        static = ended.prompt.static
        if ended.tier != "none" or static is None or 2 * static.chars < ended.prompt.chars:
            return None, None  # tiers are warmed before anyone asks, and short openings are cheap
        opening_tokens = _tokens_at(ended, static.chars)
        assert ended.counts
        if ended.counts.cached - ended.filled_tokens >= opening_tokens - tolerance(opening_tokens):
            return None, None  # it was warm, so what became of the last one's says nothing
        last = history.last_opened(
            opening, namespace=ended.namespace, before_s=ended.at_s + _GRACE_S
        )
        if last is None:
            return None, None
        fingerprint, at_s = last
        opened = self._of(ended)
        if fingerprint != opened.identity.fingerprint:
            was, now = history.described(fingerprint), opened.identity.described
            return tuple(name for name in now if was.get(name) != now[name]), None
        return None, Cause.ENGINE_RESTARTED if at_s < opened.at_s else Cause.EVICTED

    def _remember(
        self, ended: EndedRequest, parts: Parts, digests: list[bytes], like: Remembered | None
    ) -> None:
        reply = ended.reply.segment if ended.reply else None
        marks = set(digests)
        if reply is not None:
            marks.add(ended.prompt.continued(reply).digest)
        self._recent.add(
            Remembered(
                ended.id,
                ended.namespace,
                parts.continued(reply),
                frozenset(marks),
                ended.at_s,
                ended.at_s + ended.ended_s - ended.received_s,
                ended.engine,
                reasoned=_has_reasoning(ended.reply),
            ),
            like=like,
        )


def _has_reasoning(reply: Reply | None) -> bool:
    """Whether a reply reasoned, in a field of its own or within its text."""
    if reply is None:
        return False
    return reply.reasons or bool(reply.segment and "</think>" in reply.segment.text)


def _opening(parts: Parts, *, key: bytes) -> bytes:
    """A digest of how a prompt begins: tools, arguments and system text, or the first message."""
    h = hashlib.blake2b(key=key, digest_size=16)
    for tool in parts.tools:
        h.update(tool.text.encode("utf-8", "surrogatepass"))
    for name, text in parts.arguments:
        h.update(f"\0{name}={text}".encode("utf-8", "surrogatepass"))
    for index, segment in enumerate(parts.segments):
        if index and segment.role not in SYSTEM_ROLES:
            break
        h.update(f"\0{segment.role}\0{segment.text}".encode("utf-8", "surrogatepass"))
    return h.digest()


def _agrees_tokens(ended: EndedRequest, parts: Parts, like: Remembered, nearest: Nearest) -> int:
    """Where a prompt parts from the nearest one, in tokens."""
    counts, prompt = ended.counts, ended.prompt
    assert counts
    difference = nearest.difference
    if difference is not None and difference.where in ("tool", "argument"):
        # Tools may be rendered behind the system text, but no plan counts on that.
        return 0
    if prompt.is_raw:
        share = difference.at_chars / max(difference.part_chars, 1) if difference else 1.0
        return int(share * counts.prompt)
    chars = (
        difference.prompt_chars
        if difference is not None
        else chars_before(parts.segments, len(like.parts.segments))
    )
    return _tokens_at(ended, prompt.marks[0].chars + chars)


def _reach_tokens(ended: EndedRequest, nearest: Nearest, agrees: int) -> int:
    """How much of a prompt can be warm by what it has in common with the nearest one."""
    difference, static = nearest.difference, ended.prompt.static
    if difference is not None and difference.where in ("tool", "argument") and static:
        return _tokens_at(ended, static.chars) - 1
    return agrees + int(tolerance(agrees))


def _tokens_at(ended: EndedRequest, chars: int) -> int:
    counts, prompt = ended.counts, ended.prompt
    assert counts
    anchors = {prompt.chars: counts.prompt}
    static = prompt.static
    if static is not None and ended.static_tokens is not None:
        anchors[static.chars] = min(ended.static_tokens, counts.prompt)
    return tokens_at(chars, anchors=anchors)


def _entry(
    ended: EndedRequest, record: dict[str, Any], fingerprint: str, opening: bytes
) -> PastRequest:
    tokens = record["tokens"]
    warm = tokens["prompt"] - tokens["cold"]
    difference = record["difference"]
    return PastRequest(
        id=ended.id,
        namespace=ended.namespace,
        at_s=ended.at_s,
        day=_day(ended.at_s),
        cause=record["cause"],
        plan=record["plan"],
        fingerprint=fingerprint,
        opening=opening,
        has_text=bool(difference and difference["before"] is not None),
        record=record,
        warm_tokens=warm,
        cold_tokens=tokens["cold"],
        decoded_tokens=tokens["decoded"],
        spared_s=warm * ended.prefill_s_per_token,
    )


def _day(at_s: float) -> str:
    """The local date: what people call today."""
    return time.strftime("%Y-%m-%d", time.localtime(at_s))
