"""The engine's HTTP interface: one method a call, foreign errors translated here and only here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from keepwarm.core.job import Progress
from keepwarm.core.reply import Counts, counts_of, stream_events
from keepwarm.engine.http import EngineHttp
from keepwarm.engine.options import EXACT
from keepwarm.errors import EngineDownError, EngineError, EngineRefusedError

# An engine busy with a large batch answers nothing for as long as the batch takes.
_CALL_TIMEOUT_S = 60.0
_FILL_TIMEOUT_S = 1800.0
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class SlotFileInfo:
    """What a save or restore reported: tokens, bytes, and seconds of the engine's loop."""

    tokens: int
    size_bytes: int
    seconds: float


class EngineClient:
    """Calls to one engine at one address. Safe for many tasks.

    Every method raises `EngineDownError` if the engine can't be reached or stops answering,
    `EngineRefusedError` for its 4xx and `EngineError` for its 5xx or an answer that isn't JSON.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, opens_ahead: bool = False
    ) -> None:
        self.base_url = base_url.rstrip("/")
        # For what is passed through as it is.
        self.http = EngineHttp(base_url, api_key=api_key, opens_ahead=opens_ahead)
        self._erases_first = False

    async def health(self, *, timeout_s: float = 5.0) -> bool:
        """Whether the engine is up and its model loaded, and says so within a time."""
        try:
            await self._call("GET", "/health", timeout_s=timeout_s)
        except EngineError:
            # A proxy before a dead server answers too, with an error or with a page.
            return False
        return True

    async def props(self) -> dict[str, Any]:
        """The engine's `/props`: chat template, build, slots, context a slot."""
        return dict(await self._call("GET", "/props"))

    async def models(self) -> dict[str, Any]:
        """The engine's `/v1/models`."""
        return dict(await self._call("GET", "/v1/models"))

    async def slots(self) -> list[dict[str, Any]]:
        """The engine's `/slots`, a list of objects."""
        value = await self._call("GET", "/slots")
        return value if isinstance(value, list) else []

    async def notice_drafts(self) -> None:
        """Ask whether the engine speculates, and restore with that in mind from now on.

        Behind a restore of a longer prefix over a shorter one its draft model lacks what lies
        between: the next request fails ("failed to process speculative batch"). An empty slot's
        doesn't.
        """
        try:
            slots = await self.slots()
        except EngineDownError:
            raise
        except EngineError:
            slots = []  # that page can be turned off
        self._erases_first = any(slot.get("speculative") for slot in slots)

    async def render(self, body: Mapping[str, Any]) -> str:
        """The rendered prompt of a chat body (`/apply-template`)."""
        return str((await self._call("POST", "/apply-template", body)).get("prompt", ""))

    async def count(self, body: Mapping[str, Any]) -> int:
        """The tokens of a chat body's prompt, pictures included."""
        try:
            told = await self._call("POST", "/v1/chat/completions/input_tokens", body)
            return int(told["input_tokens"])
        except EngineRefusedError as error:
            if error.refused_status != HTTPStatus.NOT_FOUND:
                raise
        return len(await self.tokenize(await self.render(body)))  # an engine without that page

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of rendered text, special tokens parsed, as the engine does for a prompt.

        Not `add_special`: of a text that stands behind another one.
        """
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return list((await self._call("POST", "/tokenize", body))["tokens"])

    async def fill(
        self,
        tokens: Sequence[int],
        *,
        slot: int,
        progress: Callable[[Progress], None] | None = None,
    ) -> Counts:
        """Prefill a slot to exactly these tokens, generating nothing.

        Args:
            tokens: the whole prefix; what the slot holds of it already isn't computed again.
            slot: the slot's id.
            progress: called after each batch.
        """
        body = {
            "prompt": list(tokens),
            "n_predict": 0,
            "id_slot": slot,
            "cache_prompt": True,
            **EXACT,
            "stream": progress is not None,
            "return_progress": progress is not None,
        }
        if progress is None:
            reply = await self._call("POST", "/completion", body, timeout_s=_FILL_TIMEOUT_S)
        else:
            reply = await self._fill_streamed(body, progress)
        counts = counts_of(reply)
        if counts is None:
            raise EngineError("The engine's /completion reply holds no timings.")
        return counts

    async def _fill_streamed(
        self, body: Mapping[str, Any], progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async for event in self.stream(body):
            last = event
            if (at := event.get("prompt_progress")) and at.get("total"):
                names = ("total", "cache", "processed", "time_ms")
                progress(Progress(*(int(at.get(name, 0)) for name in names)))
        return last

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed `/completion`, as they come."""
        data = msgspec.json.encode(body)
        sent = self.http.request("POST", "/completion", headers=_JSON, body=data)
        with closing(await sent) as response:
            if response.status != 200:
                said = _message(await response.read())
                raise EngineError(f"The engine answered {response.status} to a completion: {said}")
            async for line in response.lines():
                for event in stream_events(line):
                    yield event

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A whole chat completion, not streamed."""
        return dict(
            await self._call("POST", "/v1/chat/completions", body, timeout_s=_FILL_TIMEOUT_S)
        )

    async def save(self, slot: int, filename: str) -> SlotFileInfo:
        """Save a slot under a name in the engine's slot directory."""
        reply = await self._slot(slot, "save", {"filename": filename})
        timings = reply.get("timings") or {}
        return SlotFileInfo(
            int(reply.get("n_saved", 0)),
            int(reply.get("n_written", 0)),
            float(timings.get("save_ms", 0)) / 1e3,
        )

    async def restore(self, slot: int, filename: str) -> SlotFileInfo:
        """Restore a slot from a name in the slot directory. A refused restore clears the slot."""
        if self._erases_first:
            await self.erase(slot)
        reply = await self._slot(slot, "restore", {"filename": filename})
        timings = reply.get("timings") or {}
        return SlotFileInfo(
            int(reply.get("n_restored", 0)),
            int(reply.get("n_read", 0)),
            float(timings.get("restore_ms", 0)) / 1e3,
        )

    async def erase(self, slot: int) -> None:
        """Empty a slot."""
        await self._slot(slot, "erase", {})

    async def _slot(self, slot: int, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = dict(await self._call("POST", f"/slots/{slot}?action={action}", body))
        # An id out of range wraps and hits another slot, so what was hit is compared.
        if reply.get("id_slot", slot) != slot:
            raise EngineError(f"The engine acted on slot {reply['id_slot']} instead of {slot}.")
        return reply

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = _CALL_TIMEOUT_S,
    ) -> Any:
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(timeout_s):
                sent = self.http.request(method, path, headers=_JSON, body=data)
                with closing(await sent) as response:
                    raw = await response.read()
        except TimeoutError as error:
            raise EngineDownError(
                f"The engine gave no answer to {path} within {timeout_s:.0f} s."
            ) from error
        if response.status == 503:
            raise EngineDownError(f"The engine isn't ready: {_message(raw)}")
        if 400 <= response.status < 500:
            raise EngineRefusedError(_message(raw), status=response.status, body=raw)
        if response.status >= 500:
            raise EngineError(f"The engine failed on {path}: {_message(raw)}")
        try:
            return msgspec.json.decode(raw)
        except msgspec.DecodeError as error:
            raise EngineError(f"The engine's answer to {path} isn't JSON.") from error


def _message(raw: bytes) -> str:
    try:
        value = msgspec.json.decode(raw)
        return str(value["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return raw[:200].decode("utf-8", "replace")


def names_of(models: Mapping[str, Any]) -> tuple[str, ...]:
    """What an engine calls its models: ids and aliases of its `/v1/models`."""
    listed = models.get("data")
    out: list[str] = []
    for model in listed if isinstance(listed, list) else ():
        if isinstance(model, Mapping):
            aliases = model.get("aliases")
            out += [str(model.get("id")), *(aliases if isinstance(aliases, list) else ())]
    return tuple(dict.fromkeys(out))
