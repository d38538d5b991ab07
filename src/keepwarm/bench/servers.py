"""The servers under test: a bare engine, and Keepwarm by its own command.

Theory of operation. Each is a child process behind a pipe, so it ends when the benchmark does,
however that ends. They are started here and then only asked over HTTP. What a run writes (store,
settings, staged slot files) lies in one private place that `Workplace` removes.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from keepwarm.bench.client import ChatClient
from keepwarm.engine.options import EngineOptions
from keepwarm.engine.process import EngineProcess, binary_engine, embedded_engine, free_port
from keepwarm.errors import EngineStartError
from keepwarm.operate.settings_file import settings_toml
from keepwarm.settings import Settings, fields
from keepwarm.staging import default_staging

_POLL_S = 0.01
# A first start prefills every tier; on a slow machine with a large model that takes minutes.
_READY_TIMEOUT_S = 3600.0

Tell = Callable[[str], None]


class Workplace:
    """A private directory for one run, and its staging directory; both are gone at the end."""

    def __init__(self, staging_bytes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="keepwarm-bench-"))
        self._staging_bytes = staging_bytes
        self._stagings: set[Path] = set()

    def __enter__(self) -> Workplace:
        """Use it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove all of it."""
        for staging in self._stagings:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def store(self, name: str) -> Path:
        """A store's directory; the same name gives the same one."""
        path = self.root / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def staging(self, store: Path) -> Path:
        """Where Keepwarm would stage that store's slot files by itself."""
        path = default_staging(store, need_bytes=self._staging_bytes)
        self._stagings.add(path)
        return path


class Server:
    """One server process, started and ended as often as wanted, always at the same address."""

    def __init__(self, make: Callable[[], EngineProcess], *, port: int, client: ChatClient) -> None:
        self._make = make
        self._client = client
        self._process: EngineProcess | None = None
        self.base_url = f"http://127.0.0.1:{port}"

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and not self._process.exited.is_set()

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process else None

    def resident_bytes(self) -> int | None:
        """Memory of its process that isn't swapped out; None while it doesn't run.

        As the engine's own supervision reads it, and by `ps` where there is no /proc.
        """
        if self._process is None:
            return None
        return self._process.resident_bytes() or resident_by_ps(self._process.pid)

    def cpu_seconds(self) -> float | None:
        """Processor time its own process has taken; None where /proc doesn't tell."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return None
        # The name in brackets may hold spaces; utime and stime are fields 14 and 15.
        fields_behind = stat.rpartition(")")[2].split()
        ticks = int(fields_behind[11]) + int(fields_behind[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    async def start(self, tell: Tell | None = None) -> float:
        """Start it and wait until `/health` answers 200.

        Args:
            tell: called with what the server says it is doing meanwhile.

        Returns:
            Seconds from the start of the process until ready.

        Raises:
            EngineStartError: it ended instead; the message holds its last lines.
        """
        began = time.perf_counter()
        self._process = self._make()
        await self._process.start()
        await self._until_ready(began + _READY_TIMEOUT_S, tell)
        return time.perf_counter() - began

    async def _until_ready(self, deadline: float, tell: Tell | None) -> None:
        assert self._process
        said = ""
        while True:
            status, body = await self._client.get(self.base_url + "/health")
            if status == 200:
                return
            if self._process.exited.is_set():
                raise EngineStartError(
                    f"A server of the benchmark ended while it started. Its last lines:\n"
                    f"{self._process.last_lines or '(it said nothing)'}"
                )
            if time.perf_counter() > deadline:
                raise EngineStartError(
                    f"A server of the benchmark wasn't ready within {_READY_TIMEOUT_S:.0f} s."
                )
            if tell and isinstance(body, dict) and (detail := str(body.get("detail") or "")):
                if detail != said:
                    tell(detail)
                said = detail
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """End it; nothing happens if it is gone."""
        if self._process:
            await self._process.stop()
            self._process = None

    async def crash(self) -> float:
        """Kill it with SIGKILL and start it again at once; seconds until ready.

        Raises: as `start`.
        """
        assert self._process
        began = time.perf_counter()
        self._process.kill()
        await self._process.exited.wait()
        await self.stop()
        await self.start()
        return time.perf_counter() - began


class KeepwarmServer(Server):
    """`keepwarm serve` with settings of its own in a file of its own."""

    def __init__(self, settings: Settings, *, directory: Path, client: ChatClient) -> None:
        port = free_port()
        server = msgspec.structs.replace(
            settings.server, host="127.0.0.1", port=port, api_keys=(), api_key_file=""
        )
        self.settings = msgspec.structs.replace(settings, server=server)
        file = directory / f"keepwarm-{port}.toml"
        file.write_text(settings_toml(self.settings), encoding="utf-8")
        command = _serve_command(file)
        super().__init__(lambda: EngineProcess(command, port=port), port=port, client=client)
        self.warmed: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Empty its store, so that the next start is a first one. Only while it is stopped."""
        for path in (Path(self.settings.store.dir), Path(self.settings.store.staging_dir)):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o700, parents=True)

    @property
    def store_bytes(self) -> int:
        """What its store takes on disk, staged slot files not included."""
        store = Path(self.settings.store.dir)
        staging = Path(self.settings.store.staging_dir)
        files = (p for p in store.rglob("*") if p.is_file() and not p.is_relative_to(staging))
        return sum(p.stat().st_size for p in files)

    async def start(self, tell: Tell | None = None) -> float:
        """As every server's; the first time it keeps what was warmed, in `warmed`."""
        seconds = await super().start(tell)
        if not self.warmed:
            self.warmed = (await self.status()).get("warmed") or []
        return seconds

    async def status(self) -> dict[str, Any]:
        """Its `/keepwarm/status`; empty while it can't say."""
        _, body = await self._client.get(self.base_url + "/keepwarm/status")
        return body if isinstance(body, dict) else {}

    async def slots_now(self) -> dict[str, Any]:
        """Its `/keepwarm/slots`: slots and queue at this moment; empty while it can't say."""
        _, body = await self._client.get(self.base_url + "/keepwarm/slots")
        return body if isinstance(body, dict) else {}

    async def crash(self) -> float:
        """Kill its *engine* with SIGKILL; seconds until Keepwarm is warm again by itself.

        Raises:
            EngineStartError: it doesn't come back.
        """
        victim = (await self.status()).get("engine_pid")
        if not isinstance(victim, int):
            raise EngineStartError("Keepwarm doesn't tell its engine's process id.")
        began = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        while True:
            now = await self.status()
            if now.get("engine_pid") not in (None, victim) and now.get("state") == "ready":
                return time.perf_counter() - began
            if not self.is_running or time.perf_counter() - began > _READY_TIMEOUT_S:
                raise EngineStartError("Keepwarm didn't come back after its engine was killed.")
            await asyncio.sleep(_POLL_S)


def resident_by_ps(pid: int | None) -> int | None:
    """A process's resident memory in bytes by `ps`, for systems without /proc; None if it can't."""
    if pid is None:
        return None
    said = subprocess.run(
        ["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    kilobytes = said.stdout.strip()
    return int(kilobytes) * 1024 if kilobytes.isdecimal() else None


def bare_engine(
    options: EngineOptions,
    *,
    binary: Path | None,
    client: ChatClient,
    defaults: bool,
    plain: bool = False,
) -> Server:
    """An engine without Keepwarm.

    Args:
        options: model, context, threads and template, the same for every arm.
        binary: a `llama-server`; None for the embedded engine.
        client: asks for its health.
        defaults: leave everything else as llama-server has it; False starts it with exactly the
            flags Keepwarm would use.
        plain: only with `defaults`: one slot and no RAM prompt cache, for requests that are
            to find nothing cached.
    """
    port = free_port()

    def make() -> EngineProcess:
        if not defaults and binary:
            return binary_engine(binary, options, port=port)
        if not defaults:
            return embedded_engine(options, port=port)
        if binary:
            flags = default_flags(options, port=port, plain=plain)
            guard = [sys.executable, "-m", "keepwarm.engine.guard", str(binary)]
            return EngineProcess([*guard, *flags], port=port)
        params = default_params(options, port=port, plain=plain)
        command = [sys.executable, "-m", "keepwarm.engine.child"]
        return EngineProcess(command, port=port, stdin_line=json.dumps(params))

    return Server(make, port=port, client=client)


def default_flags(options: EngineOptions, *, port: int, plain: bool = False) -> list[str]:
    """A `llama-server`'s arguments with all about slots and caches left as it is."""
    flags = ["--model", str(options.model), "--host", "127.0.0.1", "--port", str(port), "--jinja"]
    flags += ["--ctx-size", str(options.context_tokens)]
    flags += ["--cache-type-k", options.kv_type_k, "--cache-type-v", options.kv_type_v]
    flags += ["--flash-attn", options.flash_attention]
    if plain:
        flags += ["--parallel", "1", "--cache-ram", "0"]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    if options.chat_template:
        flags += ["--chat-template-file", str(options.chat_template)]
    return [*flags, *options.extra]


def default_params(options: EngineOptions, *, port: int, plain: bool = False) -> dict[str, Any]:
    """The same for the embedded engine.

    The library's own default is one slot; -1 is what the `llama-server` program begins with, and
    makes four with one pool of context.
    """
    params = options.embedded_params(host="127.0.0.1", port=port)
    same = ("model.", "hostnames", "port", "n_ctx", "cache_type", "flash_attn", "cpuparams")
    kept = {k: v for k, v in params.items() if k.startswith((*same, "chat_template", "fit_params"))}
    return {**kept, "n_parallel": 1, "cache_ram_mib": 0} if plain else {**kept, "n_parallel": -1}


def _serve_command(file: Path) -> list[str]:
    """`keepwarm serve` behind the guard, without the settings of the user's environment.

    The environment goes before a settings file, and would make a run something else than what its
    report says. So would the user's recalibrated router; and what a run asks is no outcome to
    learn from. So the state is the run's own.
    """
    unset = ["-u", "STATE_DIRECTORY"]
    for key, _, _ in fields():
        unset += ["-u", "KEEPWARM_" + key.replace(".", "_").upper()]
    python = [sys.executable, "-m", "keepwarm"]
    guard = [sys.executable, "-m", "keepwarm.engine.guard", "/usr/bin/env", *unset]
    state = f"XDG_STATE_HOME={file.parent / 'state'}"
    return [*guard, state, *python, "serve", "--config", str(file)]
