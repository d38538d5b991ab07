"""An engine that Keepwarm starts itself: embedded or a `llama-server` binary.

Both are one child process with a pipe to its standard input that stays open as long as Keepwarm
lives (see `child` and `guard`), one log that is read line by line, and one end.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

from keepwarm.engine.arguments import unknown_argument
from keepwarm.engine.options import ENVIRONMENT, EngineOptions
from keepwarm.errors import EngineStartError, UnknownFlagError
from keepwarm.settings import child_environment

# What a person needs of a failed start fits on a screen.
_KEPT_LINES = 40
_STOP_TIMEOUT_S = 10.0
# A pipe holds 64 kB, so an engine that writes less than 640 kB a second of log never waits for us.
_READ_EVERY_S = 0.1
# So long its log is read on when it has ended; mostly the log's end comes at once.
_LAST_WORDS_S = 1.0
_LOG_FD = 2
_GUARD_PID = re.compile(r"^keepwarm-guard: pid (\d+)$")


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Which engine it is; part of the fingerprint. `build` changes with every engine upgrade."""

    kind: str
    build: str


class EngineProcess:
    """One run of an engine. Start it once; a restart is a new object on the same port.

    `exited` is set when the process is gone, for whatever reason; its slots are empty then.
    """

    def __init__(
        self,
        command: list[str],
        *,
        port: int,
        stdin_line: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Take what to run; nothing is started.

        Args:
            command: the program and its arguments.
            port: where it will answer, on the loopback address.
            stdin_line: written to its standard input first.
            environment: variables for it, where the user's own environment doesn't set them.
        """
        self._command = command
        self._stdin_line = stdin_line
        self._environment = environment or {}
        self._transport: asyncio.SubprocessTransport | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._on_line: Callable[[str], None] | None = None
        self._pid: int | None = None
        self.base_url = f"http://127.0.0.1:{port}"
        self.exited = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The engine's own process id (not the guard's), once it runs."""
        return self._pid

    @property
    def last_lines(self) -> str:
        """The last lines of the engine's log."""
        return "\n".join(self._lines)

    async def start(self, on_line: Callable[[str], None] | None = None) -> None:
        """Start the process; it answers on `base_url` some time later.

        Args:
            on_line: called with each line of the engine's log.

        Raises:
            EngineStartError: the command can't be executed.
        """
        self._on_line = on_line
        try:
            self._transport, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: _Child(self._read_line, self.exited),
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=child_environment(self._environment),
            )
        except OSError as error:
            raise EngineStartError(
                f"The engine {self._command[0]} can't be started ({error.strerror}). Check the "
                "path and that it may be executed."
            ) from error
        self._pid = self._transport.get_pid()
        if self._stdin_line:
            stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))
            stdin.write(self._stdin_line.encode() + b"\n")

    async def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL. Does nothing if it is gone."""
        transport = self._transport
        if transport is None:
            return
        if not self.exited.is_set():
            with suppress(ProcessLookupError):
                transport.terminate()
            try:
                await asyncio.wait_for(self.exited.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                self.kill()
                await self.exited.wait()
        transport.close()

    def kill(self) -> None:
        """SIGKILL, at once: for an engine that hangs."""
        if self._pid and not self.exited.is_set():
            try:
                os.kill(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def resident_bytes(self) -> int | None:
        """Memory of the engine's process that isn't swapped out; None where /proc doesn't tell."""
        try:
            text = Path(f"/proc/{self._pid}/statm").read_text(encoding="ascii")
        except OSError:
            return None
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def failure(self) -> EngineStartError:
        """Why the engine ended, with its last lines and what to do."""
        code = self._transport.get_returncode() if self._transport else None
        text = self.last_lines
        if argument := unknown_argument(text):
            return UnknownFlagError(
                f"The engine {self._command[0]} doesn't know the argument {argument}. Leave it "
                "out, or give a newer engine.",
                argument=argument,
            )
        advice = "Run the same model with llama-server by hand to see more."
        if "bind" in text or "address already in use" in text.lower():
            advice = (
                "Another program listens on the engine's port; stop it, or let Keepwarm choose."
            )
        elif "failed to allocate" in text or "out of memory" in text.lower():
            advice = "Give it a smaller --context, fewer --slots or a smaller model."
        elif "unknown model architecture" in text:
            advice = "This engine is too old for the model: upgrade it."
        return EngineStartError(
            f"The engine ended with status {code} before it was ready. {advice} Its last lines:\n"
            f"{text or '(it said nothing)'}"
        )

    def _read_line(self, line: str) -> None:
        if match := _GUARD_PID.match(line):
            self._pid = int(match[1])
            return
        self._lines.append(line)
        if self._on_line:
            self._on_line(line)


class _Child(asyncio.SubprocessProtocol):
    """Reads the log some at a time and sees the end. The names of its methods are asyncio's.

    llama-server writes each line in several pieces, ten lines a request. Read as it comes, each
    piece woke the gateway, some thirty times before a request's first token.
    """

    def __init__(self, on_line: Callable[[str], None], exited: asyncio.Event) -> None:
        self._on_line = on_line
        self._exited = exited
        self._rest = b""
        self._is_gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        process = cast("asyncio.SubprocessTransport", transport)
        self._log = cast("asyncio.ReadTransport", process.get_pipe_transport(_LOG_FD))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._on_line(line.decode("utf-8", "replace").rstrip())
        if self._is_gone:
            return
        self._log.pause_reading()
        asyncio.get_running_loop().call_later(_READ_EVERY_S, self._log.resume_reading)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd != _LOG_FD:
            return
        if self._rest:
            self.pipe_data_received(fd, b"\n")
        if self._is_gone:
            self._exited.set()

    def process_exited(self) -> None:
        # Its last words say why: they are read until the log's end. Somebody else may hold the
        # pipe, so that isn't waited for without a bound.
        self._is_gone = True
        self._log.resume_reading()
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._exited.set)

    def connection_lost(self, exc: Exception | None) -> None:
        self._exited.set()


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def embedded_engine(options: EngineOptions, *, port: int) -> EngineProcess:
    """The engine from the `xllamacpp` package, in a process of its own."""
    params = options.embedded_params(host="127.0.0.1", port=port)
    command = [sys.executable, "-m", "keepwarm.engine.child"]
    return EngineProcess(command, port=port, stdin_line=json.dumps(params), environment=ENVIRONMENT)


def embedded_identity() -> EngineIdentity:
    """The package's version: the extension itself reports build 0."""
    return EngineIdentity("xllamacpp", version("xllamacpp"))


def binary_engine(binary: Path, options: EngineOptions, *, port: int) -> EngineProcess:
    """A `llama-server` binary by path, behind the guard."""
    flags = options.binary_flags(host="127.0.0.1", port=port)
    command = [sys.executable, "-m", "keepwarm.engine.guard", str(binary), *flags]
    return EngineProcess(command, port=port, environment=ENVIRONMENT)


async def binary_identity(binary: Path) -> EngineIdentity:
    """What `llama-server --version` says.

    Raises:
        EngineStartError: the binary can't be executed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            str(binary),
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        raw, _ = await process.communicate()
    except OSError as error:
        raise EngineStartError(
            f"The engine {binary} can't be started ({error.strerror}). Check the path given with "
            "--engine and that it may be executed."
        ) from error
    text = raw.decode("utf-8", "replace")
    match = re.search(r"version:\s*(.+)", text)
    return EngineIdentity("llama-server", match[1].strip() if match else text.strip()[:80])
