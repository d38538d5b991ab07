"""A running gateway, asked over HTTP by the commands that show what it does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from keepwarm.errors import KeepwarmError
from keepwarm.settings import gateway_key

DEFAULT_URL = "http://127.0.0.1:8090"


class GatewayError(KeepwarmError):
    """The gateway can't be reached, or it refuses."""


class GatewayUnreachedError(GatewayError):
    """Nothing listens there."""


class Gateway:
    """One gateway's own routes. Use it as a context."""

    def __init__(self, url: str, key: str | None) -> None:
        """Take an address and a key; without one, KEEPWARM_API_KEY's."""
        self.url = url.rstrip("/")
        self._socket = ""
        if self.url.endswith(".sock"):
            self._socket = self.url.removeprefix("unix:")
            self.url = "http://localhost"
        key = key or gateway_key()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Gateway:
        """Open the connection."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=timeout,
            connector=aiohttp.UnixConnector(self._socket) if self._socket else None,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self._session.close()

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object from /keepwarm/.

        Raises:
            GatewayError: no answer, or a refusal, in its own words.
        """
        try:
            async with self._session.get(f"{self.url}/keepwarm/{path}") as reply:
                return await self._read(reply)
        except aiohttp.ClientError as error:
            raise self._unreached(error) from error

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What /keepwarm/ answers to a JSON object. Raises: as `get`."""
        try:
            async with self._session.post(f"{self.url}/keepwarm/{path}", json=body) as reply:
                return await self._read(reply)
        except aiohttp.ClientError as error:
            raise self._unreached(error) from error

    async def context_tokens(self) -> int | None:
        """Tokens that one conversation may have, as the engine tells; None where it doesn't."""
        try:
            async with self._session.get(f"{self.url}/props") as reply:
                props = json.loads(await reply.read()) if reply.status == 200 else {}
        except (aiohttp.ClientError, ValueError):
            return None
        told = props.get("default_generation_settings", {}).get("n_ctx")
        return told if isinstance(told, int) and told > 0 else None

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The live stream: names and bodies, until the gateway ends it.

        Raises:
            GatewayError: no answer, or a refusal.
        """
        try:
            async with self._session.get(f"{self.url}/keepwarm/events") as reply:
                if reply.status != 200:
                    await self._read(reply)
                name = ""
                # A record fits into a line of this length many times over.
                async for line in _lines(reply.content):
                    if line.startswith(b"event: "):
                        name = line[7:].decode()
                    elif line.startswith(b"data: ") and name:
                        yield name, json.loads(line[6:])
        except (aiohttp.ClientError, asyncio.IncompleteReadError) as error:
            raise self._unreached(error) from error

    async def _read(self, reply: aiohttp.ClientResponse) -> dict[str, Any]:
        try:
            body: dict[str, Any] = json.loads(await reply.read())
        except ValueError as error:
            raise GatewayError(
                f"{self.url} answers, but not as Keepwarm does (status {reply.status}). Name it "
                "with --url."
            ) from error
        if reply.status != 200:
            said = body.get("error")
            message = said.get("message") if isinstance(said, dict) else None
            if reply.status == 401:
                raise GatewayError("This Keepwarm asks for an API key. Give it with --key.")
            raise GatewayError(str(message or f"Keepwarm answers with status {reply.status}."))
        return body

    def _unreached(self, error: Exception) -> GatewayError:
        return GatewayUnreachedError(
            f"No Keepwarm answers at {self.url} ({error}). Start one with `keepwarm serve`, or "
            "name another with --url."
        )


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length; the reader's own iterator refuses long ones."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
