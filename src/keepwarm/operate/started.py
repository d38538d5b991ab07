"""A gateway that is started for one run, and everything that shares it.

Theory of operation. The gateway is a child behind the engine's guard, so it ends when this process
does, however that ends. It has a session of its own: Ctrl-C in the terminal is the client's. Two
locks in the private directory keep several runs apart:

- *users*, shared: held as long as a client may ask a gateway. Who started the gateway waits for all
  others before it is ended.
- *start*, alone: held from looking for a gateway until one answers, so that two runs at a time
  start one gateway between them.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import msgspec

from keepwarm.engine.process import free_port
from keepwarm.errors import ConfigError, EngineStartError
from keepwarm.operate.address import own_url
from keepwarm.operate.settings_file import settings_toml
from keepwarm.service.presence import stop_timeout_s
from keepwarm.settings import Settings, child_environment

_POLL_S = 0.05
_LOG_TAIL_CHARS = 2000

Tell = Callable[[str], None]


class StartedGateway:
    """A `keepwarm serve` of ours with settings of its own. Use it as a context once it is made."""

    def __init__(self, settings: Settings, home: Path) -> None:
        """Take the settings and the private directory for its file and log; nothing is started.

        Where something else listens on the port, a free one is taken.
        """
        port = settings.server.port
        if not port or _is_taken(settings.server.host, port):
            server = msgspec.structs.replace(settings.server, port=free_port())
            settings = msgspec.structs.replace(settings, server=server)
        self._settings = settings
        self._file = home / "keepwarm.toml"
        self.log = home / "gateway.log"
        self.url = own_url(settings.server)

    async def start(self, tell: Tell) -> None:
        """Start it and wait until it is warm.

        Raises:
            EngineStartError: it ended instead; the message holds the end of its log.
            ConfigError: its settings can't be written.
        """
        write_private(self._file, settings_toml(self._settings))
        write_private(self.log, "")
        keepwarm = [sys.executable, "-m", "keepwarm", "serve", "--config", str(self._file)]
        guard = [sys.executable, "-m", "keepwarm.engine.guard"]
        port = ["--port", str(self._settings.server.port)]
        with self.log.open("ab") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *(*guard, *keepwarm, *port),
                stdin=asyncio.subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env=child_environment({}),
                start_new_session=True,
            )
        try:
            await self._until_ready(tell)
        except BaseException:
            await self.stop()
            raise

    async def _until_ready(self, tell: Tell) -> None:
        said = ""
        async with aiohttp.ClientSession() as session:
            while self._process.returncode is None:
                with suppress(aiohttp.ClientError, ValueError):
                    async with session.get(f"{self.url}/health") as reply:
                        if reply.status == 200:
                            return
                        detail = str((await reply.json()).get("detail") or "")
                        if detail and detail != said:
                            tell(detail)
                        said = detail
                await asyncio.sleep(_POLL_S)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARS:]
        raise EngineStartError(f"Keepwarm couldn't be started. The end of {self.log}:\n{tail}")

    async def stop(self) -> None:
        """Let it save what is warm and end; it is killed when that takes too long."""
        process = self._process
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), stop_timeout_s(self._settings))
            except TimeoutError:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


class RunLocks:
    """The two locks of the module's text, for the gateways of one private directory."""

    def __init__(self, home: Path) -> None:
        self._users = home / "users.lock"
        self._start = home / "start.lock"
        self._held: int | None = None

    async def use(self) -> None:
        """Be one of those that may ask a gateway, until `release`."""
        self._held = _opened(self._users)
        await _lock(self._held, fcntl.LOCK_SH)

    def release(self) -> None:
        """Be none of them any more."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Be the only one that looks for a gateway and starts one."""
        number = _opened(self._start)
        try:
            await _lock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)

    @asynccontextmanager
    async def alone(self, on_wait: Callable[[], None]) -> AsyncIterator[None]:
        """Wait until nobody else asks a gateway, and let nobody begin to meanwhile."""
        self.release()
        number = _opened(self._users)
        try:
            await _lock(number, fcntl.LOCK_EX, on_wait)
            yield
        finally:
            os.close(number)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads: settings may hold keys.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}.") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _opened(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _lock(number: int, kind: int, on_wait: Callable[[], None] | None = None) -> None:
    """Take a lock without holding up the loop: who waits looks again every moment."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(number, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait and time.monotonic() > began:
                on_wait()
                on_wait = None
            await asyncio.sleep(_POLL_S)
        else:
            return


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
        return False
