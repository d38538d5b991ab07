"""A llama-server that keeps its slots' tokens honestly and misbehaves on command.

It speaks as much of the real one's HTTP as Keepwarm uses: templates, tokens, fills, slot files in
the real format, chat with counts of what was reused. `faults` holds what the next planned requests
run into, one fault a request.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections import deque
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from slotfile_bytes import CacheSpec, FileSpec

KEY = "the engine's own key"
REPLY = ["It", " is", " noon", "."]


class Fault(Enum):
    """What a planned request runs into."""

    CLOSED_BEFORE_FIRST_BYTE = "the connection is closed without an answer"
    CLOSED_IN_HEADERS = "the headers come, then the connection is closed"
    CLOSED_MID_STREAM = "the connection is closed after two events"
    CLOSED_MID_BODY = "the connection is closed in the middle of a whole reply"
    GARBAGE = "status 200 and no JSON"
    NO_COUNTS = "a reply without timings"
    STALL = "no answer until `resume` is set"
    STALL_MID_STREAM = "two events, and no more until `resume` is set"
    STALL_AT_END = "all but the stream's end, and no more until `resume` is set"
    LOADING = "503, as while the model loads"
    REFUSED = "400, as for a prompt that is too long"
    UNABLE = "501, as for an infill by a model without its tokens"
    FAILED = "500"
    DIES = "the engine dies over it, and is back a moment later"
    LIES = "the slot was restored, but nothing of it is reused"


REFUSAL = {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}
INABILITY = {"error": {"code": 501, "message": "no infill", "type": "not_supported_error"}}
NO_SLOTS = {"error": {"code": 501, "message": "This feature is not supported by multimodal"}}
FAILURE = {"error": {"code": 500, "message": "compute error", "type": "server_error"}}
STRANGER = {"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}}
LOADING = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}


def render(body: dict[str, Any], opening: str) -> str:
    """A chat template that puts the tools first."""
    out = opening
    if body.get("tools"):
        out += json.dumps(body["tools"]) + "\n"
    for message in body.get("messages") or []:
        out += f"<{message['role']}>{message.get('content') or ''}</>"
    return out + "<assistant>"


def tokenize(text: str) -> list[int]:
    """A token a word or sign."""
    return [zlib.crc32(piece.encode()) >> 2 for piece in re.findall(r"\w+|\W", text)]


class FakeEngine:
    """See the module. `start` it on a port; what it was asked is in `asked`."""

    def __init__(self, slot_dir: Path, *, slots: int = 2, seconds_a_token: float = 0.0) -> None:
        self.slot_dir = slot_dir
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.busy: set[int] = set()
        self.faults: deque[Fault] = deque()
        self.asked: list[tuple[str, Any]] = []
        self.heard: list[dict[str, str]] = []
        self.prefilled = 0
        self.resume = asyncio.Event()
        self.hung_up = 0
        self.died = 0
        # With a draft model, a longer prefix restored over a shorter one is half there.
        self.speculates = False
        self.half_restored: set[int] = set()
        # Slots whose rows are no numbers, until they are emptied.
        self.poisoned: set[int] = set()
        self.is_sleeping = False
        self.decoded_more = 0
        # It dies over whatever holds this.
        self.deadly = ""
        self.away_s = 1.5
        self.is_loading = False
        self.closes_connections = False
        # How long each fill takes, at least.
        self.fill_s = 0.0
        self.loses_restores = False
        # How many of the next restores are refused; of files that only try it, all or none.
        self.refused_restores = 0
        self.refuses_probes = False
        # It is an older one with a projector: 501 to whatever is asked of a slot.
        self.is_multimodal = False
        # Of the files that it saves; None: what is its own.
        self.file_mode: int | None = None
        self.file_version: int | None = None
        # Token ids that it doesn't know.
        self.unknown_tokens: set[int] = set()
        self.opening = "Monday. "
        self.port = 0
        self._seconds_a_token = seconds_a_token
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port as before if there was one; all slots are empty."""
        self.slots = [[] for _ in self.slots]
        self.busy.clear()
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and break off all connections."""
        if self._runner and self._runner.server:
            for connection in list(self._runner.server.connections):
                connection.force_close()
            await self._runner.cleanup()
        self._runner = None

    async def _die(self) -> None:
        await self.stop()
        # Longer than an attached server may be silent.
        await asyncio.sleep(self.away_s)
        await self.start()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        # As the real one: health and its model's name are for everybody.
        if path not in ("/health", "/v1/models") and (
            request.headers.get("Authorization") != f"Bearer {KEY}"
        ):
            return web.json_response(STRANGER, status=401)
        body = await request.json() if request.can_read_body else {}
        self.asked.append((path, body))
        self.heard.append({name.lower(): value for name, value in request.headers.items()})
        if self.is_loading:
            return web.json_response(LOADING, status=503)
        if path.startswith("/slots/"):
            response: web.StreamResponse = await self._slot(
                int(path.split("/")[2]), request.query["action"], body
            )
        elif path == "/completion" and body.get("n_predict") == 0:
            response = await self._fill(request, body)
        elif path in ("/v1/chat/completions", "/completion"):
            return await self._generate(request, body)
        else:
            response = self._told(path, body)
        if self.closes_connections:
            # Without a word in the headers, so that the client keeps it in its pool.
            await response.prepare(request)
            await response.write_eof()
            _hang_up(request)
        return response

    def _told(self, path: str, body: dict[str, Any]) -> web.Response:
        if path == "/health":
            return web.json_response({"status": "ok"})
        if path == "/props":
            return web.json_response(
                {
                    "total_slots": len(self.slots),
                    "default_generation_settings": {"n_ctx": 8192},
                    "chat_template": "fake",
                    "build_info": "fake-1",
                    "is_sleeping": self.is_sleeping,
                }
            )
        if path == "/apply-template":
            return web.json_response({"prompt": render(body, self.opening)})
        if path == "/tokenize":
            return web.json_response({"tokens": tokenize(body["content"])})
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": "fake"}]})
        if path == "/slots":
            states = [
                {"id": i, "is_processing": i in self.busy, "speculative": self.speculates}
                for i in range(len(self.slots))
            ]
            return web.json_response(states)
        return web.json_response({"error": {"message": f"no {path}"}}, status=404)

    async def _slot(self, slot: int, action: str, body: dict[str, Any]) -> web.Response:
        assert slot not in self.busy, f"{action} of a busy slot was asked for"
        out: dict[str, Any] = {"id_slot": slot}
        if self.is_multimodal:
            return web.json_response(NO_SLOTS, status=501)
        if action == "erase":
            self.slots[slot] = []
            self.poisoned.discard(slot)
            self.half_restored.discard(slot)
        elif action == "save":
            raw = slot_file(self.slots[slot], is_finite=slot not in self.poisoned)
            if self.file_version is not None:
                raw = raw[:4] + self.file_version.to_bytes(4, "little") + raw[8:]
            path = self.slot_dir / body["filename"]
            path.write_bytes(raw)
            if self.file_mode is not None:
                path.chmod(self.file_mode)
            out |= {"n_saved": len(self.slots[slot]), "n_written": len(raw)}
            out["timings"] = {"save_ms": 1.0}
        else:
            path = self.slot_dir / body["filename"]
            is_probe = path.name.startswith("probe-")
            self.refused_restores -= not is_probe
            refuses = self.refuses_probes if is_probe else self.refused_restores >= 0
            if not path.is_file() or refuses:
                self.slots[slot] = []
                return web.json_response({"error": {"message": "no file"}}, status=400)
            raw = path.read_bytes()
            tokens = file_tokens(raw)
            if self.speculates and 0 < len(self.slots[slot]) < len(tokens):
                self.half_restored.add(slot)
            self.slots[slot] = [] if self.loses_restores else tokens
            out |= {"n_restored": len(tokens), "n_read": len(raw)}
            out["timings"] = {"restore_ms": 1.0}
        return web.json_response(out)

    async def _fill(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["id_slot"] in self.half_restored:
            return web.json_response({"error": {"message": "speculative batch"}}, status=500)
        if self.unknown_tokens & set(body["prompt"]):
            return web.json_response({"error": {"message": "invalid tokens"}}, status=400)
        if not body.get("stream"):
            timings = await self._prefill(body["id_slot"], body["prompt"])
            return web.json_response({"content": "", "timings": timings})
        count = len(body["prompt"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for processed in (0, count // 2):
            at = {"total": count, "cache": 0, "processed": processed, "time_ms": processed}
            await response.write(f"data: {json.dumps({'prompt_progress': at})}\n\n".encode())
            await asyncio.sleep(self.fill_s / 2)
        timings = await self._prefill(body["id_slot"], body["prompt"])
        done = {"content": "", "timings": timings}
        await response.write(f"data: {json.dumps(done)}\n\n".encode())
        return response

    async def _prefill(self, slot: int, tokens: Sequence[int]) -> dict[str, Any]:
        assert slot not in self.busy, "two prompts run in one slot"
        self.busy.add(slot)
        try:
            held = self.slots[slot]
            same = 0
            while same < min(len(held), len(tokens) - 1) and held[same] == tokens[same]:
                same += 1
            self.slots[slot] = list(tokens[:same])
            for done in range(same, len(tokens)):
                if self._seconds_a_token and done % 8 == 0:
                    await asyncio.sleep(8 * self._seconds_a_token)
                self.slots[slot].append(tokens[done])
            self.prefilled += len(tokens) - same
        finally:
            self.busy.discard(slot)
        return {"cache_n": same, "prompt_n": len(tokens) - same, "prompt_ms": 10.0}

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.deadly and self.deadly in json.dumps(body):
            self.faults.appendleft(Fault.DIES)
        self.is_sleeping = False
        fault = self.faults.popleft() if self.faults else None
        slot = body["id_slot"]
        if fault is Fault.CLOSED_BEFORE_FIRST_BYTE:
            _hang_up(request)
            await asyncio.sleep(60)
        if fault is Fault.DIES:
            self.died += 1
            self._again = asyncio.ensure_future(self._die())
            await asyncio.sleep(60)
        if fault is Fault.STALL:
            await self._stall(slot)
        known = {
            Fault.LOADING: (LOADING, 503),
            Fault.REFUSED: (REFUSAL, 400),
            Fault.UNABLE: (INABILITY, 501),
            Fault.FAILED: (FAILURE, 500),
        }
        if fault in known:
            answer, status = known[fault]
            return web.json_response(answer, status=status)
        if fault is Fault.GARBAGE:
            return web.Response(text="<html>no JSON</html>", content_type="application/json")
        if fault is Fault.LIES:
            self.slots[slot] = []
        prompt = body.get("prompt")
        tokens = (
            prompt if isinstance(prompt, list) else tokenize(prompt or render(body, self.opening))
        )
        timings = await self._prefill(slot, tokens)
        timings |= {"predicted_n": len(REPLY) + self.decoded_more, "predicted_ms": 1.0}
        if body.get("stream"):
            return await self._stream(request, slot, timings, fault)
        return await self._whole(request, slot, timings, fault)

    async def _stall(self, slot: int) -> None:
        self.busy.add(slot)
        try:
            await self.resume.wait()
        finally:
            self.busy.discard(slot)

    def _say(self, slot: int) -> None:
        self.slots[slot] += tokenize("".join(REPLY))[:-1]

    async def _whole(
        self, request: web.Request, slot: int, timings: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        self._say(slot)
        message = {"role": "assistant", "content": "".join(REPLY)}
        reply = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        if fault is not Fault.NO_COUNTS:
            reply["timings"] = timings  # type: ignore[assignment]
        if fault is not Fault.CLOSED_MID_BODY:
            return web.json_response(reply)
        raw = json.dumps(reply).encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(raw))})
        await response.prepare(request)
        await response.write(raw[:20])
        _hang_up(request)
        return response

    async def _stream(
        self, request: web.Request, slot: int, timings: dict[str, Any], fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.busy.add(slot)
        try:
            await response.prepare(request)
            if fault is Fault.CLOSED_IN_HEADERS:
                _hang_up(request)
                return response
            for number, piece in enumerate(REPLY):
                if number == 2 and fault in (Fault.CLOSED_MID_STREAM, Fault.CLOSED_MID_BODY):
                    _hang_up(request)
                    return response
                if number == 2 and fault is Fault.STALL_MID_STREAM:
                    await self.resume.wait()
                await response.write(_event({"delta": {"content": piece}}))
                await asyncio.sleep(0)
            told = {} if fault is Fault.NO_COUNTS else {"timings": timings}
            last = _event({"delta": {}, "finish_reason": "stop"}, **told)
            await response.write(last)
            if fault is Fault.STALL_AT_END:
                await self.resume.wait()
            await response.write(b"data: [DONE]\n\n")
            self._say(slot)
        except (asyncio.CancelledError, ConnectionError):
            self.hung_up += 1
            raise
        finally:
            self.busy.discard(slot)
        return response


def slot_file(tokens: Sequence[int], *, is_finite: bool = True) -> bytes:
    """The file of a slot; its rows follow from the tokens, so that mixed-up rows would show."""
    rows = CacheSpec.random(1, tokens=len(tokens))
    # Rows that aren't finite are kept by nobody; without this bit none is.
    for tensor in (*rows.keys, *rows.values):
        np.bitwise_and(tensor, 0xBF, out=tensor)
    if not is_finite:
        rows.keys[0].fill(0xFF)
    return FileSpec(list(tokens), rows).to_bytes()


def file_tokens(raw: bytes) -> list[int]:
    """The token ids in a slot file's header."""
    count = int.from_bytes(raw[20:24], "little")
    return [int.from_bytes(raw[24 + 4 * i : 28 + 4 * i], "little") for i in range(count)]


def _event(choice: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}], **more}).encode() + b"\n\n"


def _hang_up(request: web.Request) -> None:
    if request.transport:
        request.transport.abort()
