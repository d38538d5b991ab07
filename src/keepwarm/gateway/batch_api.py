"""HTTP routes of batches: the OpenAI Files and Batch APIs, and filling a shared prefix.

`openai.OpenAI(base_url=".../v1").files` and `.batches` work unchanged. A file belongs to the
namespace of the key that uploaded it, and so do its batches.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import BodyPartReader, web

from keepwarm.api.mending import decode_body
from keepwarm.batch.hours import parse_hours
from keepwarm.batch.journal import DiskFullError, disk_errors, unwritable
from keepwarm.batch.ledger import UNFINISHED, Ledger
from keepwarm.batch.runner import RetryRule
from keepwarm.batch.tasks import URLS
from keepwarm.deployment.life import Life
from keepwarm.errors import ConfigError, KeepwarmError, RequestError, TooLargeError
from keepwarm.gateway.batch_service import BatchService
from keepwarm.gateway.client_request import ClientRequest
from keepwarm.gateway.door import Answer, SlowBodyError, namespace_of, read_body
from keepwarm.gateway.proxy import Proxy
from keepwarm.gateway.shared_prefix import warm_prefix

_PURPOSES = ("batch", "user_data")
_WINDOW = re.compile(r"^(\d{1,4})(h|d)$")
_MAX_METADATA = 16
_CHUNK_BYTES = 1 << 20
_SILENCE_S = 30.0

log = logging.getLogger("keepwarm")

T = TypeVar("T")


def batch_handlers(app: web.Application, life: Life, proxy: Proxy) -> dict[str, Answer]:
    """What answers for files and batches, by the names of the table of routes. Batches run for as
    long as the application does.

    Raises:
        ConfigError: the settings' hours can't be read.
    """
    hours = parse_hours(life.settings.batch.hours)
    site = _Site(life, proxy)

    async def serve_batches() -> None:
        # Nothing is written for a deployment that doesn't come up.
        await life.ready()
        directory = life.settings.batch.dir
        path = Path(directory).expanduser() if directory else None
        try:
            ledger = Ledger(path or life.places.state_home / "keepwarm" / "batches")
        except ConfigError as error:
            # A second Keepwarm of the same user serves all the same, but no batches.
            log.warning("no batches here: %s", error)
            site.unable = str(error)
            return
        retry = RetryRule(attempts=life.settings.batch.attempts)
        service = BatchService(life, proxy, ledger, hours=hours, retry=retry)
        site.open(ledger, service)
        await service.run()

    async def begin(_: web.Application) -> None:
        life.supervise(serve_batches(), name="batches")

    async def end(_: web.Application) -> None:
        site.close()

    app.on_startup.append(begin)
    app.on_cleanup.append(end)
    return {
        "warm_prefix": site.warm_prefix,
        "upload": site.upload,
        "files": site.files,
        "file": site.file,
        "delete_file": site.delete,
        "file_content": site.content,
        "create_batch": site.create,
        "batches": site.batches,
        "batch": site.batch,
        "cancel_batch": site.cancel,
    }


class NoBatchesError(KeepwarmError):
    """The directory of batches can't be used, or another Keepwarm has it."""

    status = 503
    kind = "batches_unavailable"


class _Site:
    """The routes. Each is within the namespace of the request's key."""

    def __init__(self, life: Life, proxy: Proxy) -> None:
        self._life = life
        self._proxy = proxy
        self._ledger: Ledger | None = None
        self._service: BatchService | None = None
        self._receiving_bytes = 0
        self.unable = "The server is starting."

    def open(self, ledger: Ledger, service: BatchService) -> None:
        self._ledger, self._service = ledger, service

    def close(self) -> None:
        if self._ledger:
            self._ledger.close()

    async def warm_prefix(self, request: web.Request) -> web.StreamResponse:
        """Fill and save a request's prefix up to the last place of its `X-Keepwarm-Shared`.

        The body is `{"url", "body"}` as in a batch's line. Nothing is generated.
        """
        namespace = self._namespace(request)
        said = decode_body(await read_body(request))
        url, body = said.get("url", "/v1/chat/completions"), said.get("body")
        if url not in URLS or not isinstance(body, dict):
            raise RequestError(
                f"Give a `body`, and a `url` that is one of {', '.join(URLS)} (chat by default)."
            )
        asked = ClientRequest(URLS[url], body, namespace, url, request.headers)
        warm = await warm_prefix(self._life, asked)
        return _json(warm.as_dict())

    async def upload(self, request: web.Request) -> web.StreamResponse:
        """Take a file in, as a form with `purpose` and `file`."""
        namespace = self._namespace(request)
        if not request.content_type.startswith("multipart/"):
            raise RequestError("Send the file as multipart/form-data, with `purpose` and `file`.")
        part = self.ledger.part()
        try:
            filename, purpose = await self._form(request, part)
            if filename is None or purpose not in _PURPOSES:
                raise RequestError(
                    f"Give a `file`, and a `purpose` that is one of {', '.join(_PURPOSES)}."
                )
            name, why = filename, purpose
            made = await self._do(
                lambda led: led.add_file(part, namespace=namespace, filename=name, purpose=why)
            )
        finally:
            self.ledger.drop_part(part)
        return _json(made)

    async def _form(self, request: web.Request, part: Path) -> tuple[str | None, str | None]:
        """Write a form's file down; its name, and the purpose.

        Raises:
            RequestError: it breaks off, or is no form.
        """
        filename: str | None = None
        purpose: str | None = None
        try:
            async for field in await request.multipart():
                if not isinstance(field, BodyPartReader):
                    continue
                if field.name == "file":
                    filename = field.filename or "file"
                    await self._receive(field, part)
                elif field.name == "purpose":
                    purpose = (await field.read_chunk(256)).decode("utf-8", "replace").strip()
        except (ValueError, AssertionError) as error:  # aiohttp's, of a form that breaks off
            raise RequestError(f"The form can't be read: {error}.") from error
        return filename, purpose

    async def _receive(self, field: BodyPartReader, part: Path) -> None:
        """Write an upload down as it comes, within the bounds."""
        settings = self._life.settings.batch
        size = 0
        with disk_errors(part):
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            while chunk := await _chunk_of(field):
                size += len(chunk)
                self._receiving_bytes += len(chunk)
                if size > settings.max_file_bytes:
                    raise TooLargeError(
                        f"The file is over {settings.max_file_bytes:,} bytes "
                        "(batch.max_file_bytes)."
                    )
                # Other uploads that come meanwhile take room, too.
                if self._receiving_bytes > settings.quota_bytes - self.ledger.used_bytes():
                    raise DiskFullError(
                        f"The files would take over {settings.quota_bytes:,} bytes "
                        "(batch.quota_bytes). Delete some."
                    )
                await asyncio.to_thread(_write_all, fd, bytes(chunk))
            await asyncio.to_thread(os.fsync, fd)
        except OSError as error:
            raise unwritable(part, error) from error
        finally:
            self._receiving_bytes -= size
            os.close(fd)

    async def files(self, request: web.Request) -> web.StreamResponse:
        """List files."""
        namespace = self._namespace(request)
        purpose = request.query.get("purpose")
        listed = await self._do(lambda led: led.list_files(namespace, purpose=purpose))
        return _page(request, listed, most=10_000)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """One file's object."""
        namespace, file_id = self._namespace(request), request.match_info["id"]
        return _json(await self._do(lambda led: led.file(file_id, namespace)))

    async def content(self, request: web.Request) -> web.StreamResponse:
        """A file's bytes."""
        namespace, file_id = self._namespace(request), request.match_info["id"]
        path = await self._do(lambda led: led.content(file_id, namespace))
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Remove a file."""
        namespace, file_id = self._namespace(request), request.match_info["id"]
        await self._do(lambda led: led.delete_file(file_id, namespace))
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Begin a batch over an uploaded file."""
        namespace = self._namespace(request)
        said = decode_body(await read_body(request))
        endpoint, file_id = said.get("endpoint"), said.get("input_file_id")
        window, metadata = said.get("completion_window"), said.get("metadata")
        if endpoint not in URLS:
            raise RequestError(f"The endpoint must be one of {', '.join(URLS)}.")
        if not isinstance(file_id, str):
            raise RequestError("input_file_id must be the id of an uploaded file.")
        window_s = _window_s(window)
        _check_metadata(metadata)
        made = await self._do(
            lambda led: led.add_batch(
                namespace=namespace,
                input_file_id=file_id,
                endpoint=endpoint,
                window=str(window),
                window_s=window_s,
                metadata=metadata,
            )
        )
        self.service.created()
        return _json(made)

    async def batches(self, request: web.Request) -> web.StreamResponse:
        """List batches."""
        namespace = self._namespace(request)
        listed = await self._do(lambda led: led.list_batches(namespace))
        return _page(request, [self._live(batch) for batch in listed], most=100)

    async def batch(self, request: web.Request) -> web.StreamResponse:
        """One batch's object."""
        namespace, batch_id = self._namespace(request), request.match_info["id"]
        found = await self._do(lambda led: led.batch(batch_id, namespace))
        return _json(self._live(found))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """End a batch: tasks in flight end, the others don't begin."""
        namespace, batch_id = self._namespace(request), request.match_info["id"]
        found = await self._do(lambda led: led.batch(batch_id, namespace))
        if found["status"] not in UNFINISHED:
            raise RequestError(f"The batch has ended already: {found['status']}.")
        if found["status"] != "cancelling":
            found = await self._do(lambda led: led.change(batch_id, status="cancelling"))
        self.service.cancelled(batch_id)
        return _json(self._live(found))

    @property
    def ledger(self) -> Ledger:
        """What is kept. Raises: NoBatchesError."""
        if self._ledger is None:
            raise NoBatchesError(f"This Keepwarm runs no batches. {self.unable}")
        return self._ledger

    @property
    def service(self) -> BatchService:
        """What runs it; there is one where there is a ledger."""
        assert self._service
        return self._service

    def _namespace(self, request: web.Request) -> str:
        return namespace_of(request)

    def _live(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "request_counts": self.service.counts(batch)}

    async def _do(self, work: Callable[[Ledger], T]) -> T:
        # A commit waits for the disk, and streams of tokens share this loop.
        return await asyncio.to_thread(work, self.ledger)


async def _chunk_of(field: BodyPartReader) -> bytes:
    """The next bytes of an upload.

    Raises:
        SlowBodyError: nothing came for too long.
    """
    try:
        async with asyncio.timeout(_SILENCE_S):
            return await field.read_chunk(_CHUNK_BYTES)
    except TimeoutError as error:
        raise SlowBodyError("The file didn't come in time.") from error


def _write_all(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _window_s(window: object) -> int:
    match = _WINDOW.match(window) if isinstance(window, str) else None
    if match is None or not int(match[1]):
        raise RequestError("completion_window must be like `24h` or `7d`.")
    return int(match[1]) * (3600 if match[2] == "h" else 86400)


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    texts = (
        [text for pair in metadata.items() for text in pair] if isinstance(metadata, dict) else [0]
    )
    if len(texts) > 2 * _MAX_METADATA or not all(
        isinstance(text, str) and len(text) <= 512 for text in texts
    ):
        raise RequestError(f"metadata must be an object of {_MAX_METADATA} short texts at most.")


def _page(request: web.Request, listed: list[dict[str, Any]], *, most: int) -> web.Response:
    """A page of a list, as OpenAI's clients ask for it: `limit`, `after`, `order`."""
    if request.query.get("order") == "asc":
        listed.reverse()
    limit = request.query.get("limit", "20" if most <= 100 else str(most))
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise RequestError(f"limit must be a number from 1 to {most:,}.")
    after = request.query.get("after")
    if after is not None:
        place = next((i for i, item in enumerate(listed) if item["id"] == after), len(listed))
        listed = listed[place + 1 :]
    page = listed[: int(limit)]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(listed) > len(page),
        }
    )


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )
