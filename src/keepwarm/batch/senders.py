"""How a runner reaches a Keepwarm: what is sent, what comes back, and the way over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import msgspec

from keepwarm.batch.tasks import Task
from keepwarm.core.hints import (
    BATCH,
    NODE_HEADER,
    PRIORITY_HEADER,
    SHARED_HEADER,
    format_ends,
)
from keepwarm.core.prompt import SharedEnd
from keepwarm.errors import KeepwarmError

WARM_PREFIX_PATH = "/keepwarm/warm-prefix"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `headers` have Keepwarm's own names in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def request_id(self) -> str:
        """Keepwarm's id of the request."""
        return self.headers.get("x-keepwarm-request-id", "")

    @property
    def node(self) -> str:
        """The node of a fleet that answered; '' of a single Keepwarm."""
        return self.headers.get(NODE_HEADER.lower(), "")

    @property
    def kind(self) -> str:
        """The word for what went wrong; '' if the body says none."""
        try:
            error = msgspec.json.decode(self.body)["error"]
            return str(error.get("type") or "")
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
            return ""

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks to wait before another try."""
        try:
            return float(self.headers.get("retry-after", ""))
        except ValueError:
            return None


class UnreachableError(KeepwarmError):
    """No answer. `begun`: the request had been sent, so it may be why."""

    status = 503
    retry = True

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun


class RefusedError(UnreachableError):
    """The server is there and takes nothing from this sender."""

    status = 401
    retry = False


class Sender(Protocol):
    """A Keepwarm to send tasks to. On several nodes, `lane` says to which (see `night`)."""

    async def send(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Send a task. Raises: UnreachableError."""

    async def fill(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Fill and save a task's prefix to the last of `ends`. Raises: UnreachableError."""

    async def is_up(self) -> bool:
        """Whether it would answer now."""

    async def refusal(self) -> str:
        """Why it takes no task of this run, whatever it is; '' if it does."""


def batch_headers(ends: Sequence[SharedEnd]) -> dict[str, str]:
    """What a task's request says of itself."""
    headers = {PRIORITY_HEADER: BATCH}
    if ends:
        headers[SHARED_HEADER] = format_ends(ends)
    return headers


class HttpSender:
    """A Keepwarm at a URL. Use it as an async context.

    `nodes` are the names of a fleet's nodes behind that URL; none for a single Keepwarm.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self.nodes: tuple[str, ...] = ()

    async def __aenter__(self) -> HttpSender:
        """Open the connections."""
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            # A task waits for hours where interactive requests go first.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close them."""
        if self._session:
            await self._session.close()

    async def send(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Send a task. Raises: UnreachableError."""
        return await self._post(task.url, task.body, self._told(ends, lane))

    async def fill(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Fill and save a prefix. Raises: UnreachableError."""
        body = {"url": task.url, "body": task.body}
        return await self._post(WARM_PREFIX_PATH, body, self._told(ends, lane))

    def _told(self, ends: Sequence[SharedEnd], lane: int) -> dict[str, str]:
        headers = batch_headers(ends)
        if self.nodes:
            headers[NODE_HEADER] = self.nodes[lane % len(self.nodes)]
        return headers

    async def find_nodes(self) -> None:
        """Ask whether a fleet is there, and for its nodes that are ready. Raises: UnreachableError.

        A single Keepwarm has no such page.
        """
        assert self._session
        try:
            async with self._session.get(self.base_url + "/keepwarm/fleet") as reply:
                told = msgspec.json.decode(await reply.read()) if reply.status == 200 else {}
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            raise UnreachableError(
                f"{self.base_url} doesn't tell its nodes: {error}.", begun=False
            ) from error
        nodes = told.get("nodes", {})
        # By the fleet's own names: what nodes call themselves is unique on one machine only.
        ready = sorted(name for name, node in nodes.items() if node.get("state") == "ready")
        self.nodes = tuple(ready) if len(ready) > 1 else ()

    async def is_up(self) -> bool:
        """Whether it is ready (or serves while it warms)."""
        assert self._session
        try:
            async with self._session.get(self.base_url + "/health") as reply:
                return reply.status == 200
        except aiohttp.ClientError:
            return False

    async def refusal(self) -> str:
        """What is wrong with the key or the address, asked by a page that needs no task."""
        try:
            await self.status()
        except UnreachableError as error:
            return str(error)
        return ""

    async def status(self) -> dict[str, Any]:
        """`/keepwarm/status`.

        Raises:
            RefusedError: it takes no key like this one.
            UnreachableError: it isn't a Keepwarm that answers.
        """
        assert self._session
        try:
            async with self._session.get(self.base_url + "/keepwarm/status") as reply:
                if reply.status in (401, 403):
                    raise RefusedError(
                        f"{self.base_url} refuses the key (HTTP status {reply.status}). Name the "
                        "right one with --key-file.",
                        begun=False,
                    )
                value = msgspec.json.decode(await reply.read())
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            raise UnreachableError(
                f"No Keepwarm answers at {self.base_url}: {error}.", begun=False
            ) from error
        if not isinstance(value, dict) or "state" not in value:
            said = value.get("error", {}).get("message", "") if isinstance(value, dict) else ""
            raise UnreachableError(
                f"{self.base_url} doesn't answer as a Keepwarm. {said}".strip(), begun=False
            )
        return value

    async def _post(self, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        assert self._session
        data = msgspec.json.encode(body)
        try:
            async with self._session.post(
                self.base_url + path, data=data, headers=headers
            ) as reply:
                raw = await reply.read()
                named = {k.lower(): v for k, v in reply.headers.items()}
                return Answer(reply.status, raw, named)
        except aiohttp.ClientConnectorError as error:
            raise UnreachableError(f"{self.base_url} can't be reached.", begun=False) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(
                f"{self.base_url} went away before it answered: {error}.", begun=True
            ) from error
