"""`keepwarm run`: a client, a gateway for it, and what was spared, from beginning to end.

1. The client's executable is found, or its installation is told.
2. A gateway that answers at the settings' address is used, and stays. Otherwise one is started and
   ended again behind the client.
3. The client gets its environment and its private files, and the terminal. Signals go to it.
4. Its exit status is ours. What the gateway's account says of the time between is told.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.errors import ConfigError
from keepwarm.operate.clients import Client, Configured, Endpoint
from keepwarm.operate.gateway_client import Gateway, GatewayError, GatewayUnreachedError
from keepwarm.operate.started import RunLocks, StartedGateway, Tell, write_private
from keepwarm.settings import Settings, client_environment

# What shells answer for a program that a signal ended.
_SIGNALLED = 128
# What somebody else asks of the same gateway isn't waited for much longer.
_SETTLED_S = 5.0
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Spared:
    """What a gateway's account says of the time between two looks at it."""

    requests: int
    prompt_tokens: int
    warm_tokens: int
    seconds: float

    def told(self) -> str:
        """In a sentence."""
        if not self.prompt_tokens:
            return "no prompt tokens were asked for"
        share = 100 * self.warm_tokens / self.prompt_tokens
        seconds = f"{self.seconds / 60:.0f} min" if self.seconds >= 120 else f"{self.seconds:.1f} s"
        return (
            f"{self.requests:,} request{'s' if self.requests != 1 else ''}, "
            f"{self.prompt_tokens:,} prompt tokens, of which {self.warm_tokens:,} "
            f"({share:.0f} %) were spared: about {seconds}"
        )


def find_executable(client: Client) -> Path:
    """Where the client is installed.

    Raises:
        ConfigError: nowhere; says how to install it.
    """
    found = shutil.which(client.command)
    if found:
        return Path(found)
    for place in client.places:
        path = Path(place).expanduser()
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise ConfigError(
        f"{client.title} isn't installed: there is no `{client.command}` on the PATH. Install it "
        f"with `{client.install}`."
    )


def printed(client: Client, configured: Configured, home: Path, arguments: Sequence[str]) -> str:
    """What a run would set, as a shell script that does the same."""
    lines = []
    for name, value in configured.environment.items():
        lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    for name, text in configured.files.items():
        file = shlex.quote(str(home / name))
        lines += [f"mkdir -p {shlex.quote(str(home))}", f"cat > {file} <<'KEEPWARM'"]
        lines += [text.rstrip("\n"), "KEEPWARM"]
    command = [client.command, *configured.arguments, *arguments]
    return "\n".join([*lines, shlex.join(command)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRun:
    """One run: which client, with what, against which gateway.

    `url` is where a gateway is looked for. `make_settings` is asked when none answers, for the
    settings of one that is started; None: none may be, because the address was named. `home` is the
    private directory of all runs.
    """

    client: Client
    arguments: tuple[str, ...]
    url: str
    key: str | None
    make_settings: Callable[[], Settings | None]
    home: Path
    tell: Tell

    async def run(self) -> int:
        """Run the client to its end; its exit status, 128 and the signal's number if one ended it.

        Raises:
            ConfigError: the client isn't installed, or nothing answers where it was to.
            KeepwarmError: no gateway could be started.
        """
        executable = find_executable(self.client)
        locks = RunLocks(self.home)
        await locks.use()
        started: StartedGateway | None = None
        try:
            async with locks.starting():
                before = await self._account(self.url)
                if before is None:
                    started = await self._start()
                    before = await self._account(started.url)
            url = started.url if started else self.url
            moves_blocks = "move-known" in ((before or {}).get("hygiene") or ())
            if started is None:
                self._advise(before or {}, moves_blocks=moves_blocks)
            endpoint = await self._endpoint(url, moves_blocks=moves_blocks)
            status = await self._client(executable, endpoint)
            await self._settled(url)
            after = await self._account(url)
            if before and after:
                self.tell(spared_between(before, after).told())
            elif before:
                self.tell("the gateway doesn't answer any more")
            return status
        finally:
            if started:
                async with locks.alone(lambda: self.tell("others still use the gateway; waiting")):
                    self.tell("ending the gateway; what is warm is saved")
                    await started.stop()
            locks.release()

    async def _start(self) -> StartedGateway:
        settings = self.make_settings()
        if settings is None:
            raise ConfigError(f"No Keepwarm answers at {self.url}. Start it with `keepwarm serve`.")
        gateway = StartedGateway(settings, self.home)
        name = Path(settings.engine.model).name or settings.engine.upstream
        self.tell(f"starting a gateway on {gateway.url} with {name}")
        await gateway.start(self.tell)
        return gateway

    async def _account(self, url: str) -> dict[str, Any] | None:
        """The gateway's sums; None where none answers."""
        async with Gateway(url, self.key) as gateway:
            with suppress(GatewayUnreachedError):
                return await gateway.get("overview")
        return None

    async def _settled(self, url: str) -> None:
        """Wait until the client's last requests are over and counted: it may end before they do."""
        async with Gateway(url, self.key) as gateway:
            with suppress(GatewayError):
                for _ in range(round(_SETTLED_S / _LOOK_EVERY_S)):
                    await asyncio.sleep(_LOOK_EVERY_S)
                    now = await gateway.get("slots")
                    if all(slot["state"] == "idle" for slot in now["slots"]):
                        break
        await asyncio.sleep(_LOOK_EVERY_S)

    async def _endpoint(self, url: str, *, moves_blocks: bool) -> Endpoint:
        async with Gateway(url, self.key) as gateway:
            context_tokens = await gateway.context_tokens()
        return Endpoint(url, self.key or "none", context_tokens, moves_blocks)

    def _advise(self, overview: dict[str, Any], *, moves_blocks: bool) -> None:
        self.tell(f"using the Keepwarm that runs at {self.url} ({overview.get('model')})")
        if not moves_blocks:
            self.tell(
                "it runs without the rule move-known (hygiene.rules), so a new day, directory or "
                "commit is prefilled with all that stands behind it"
            )

    async def _client(self, executable: Path, endpoint: Endpoint) -> int:
        private = self.home / self.client.name
        configured = self.client.configure(endpoint, private)
        for name, text in configured.files.items():
            write_private(private / name, text)
        command = [str(executable), *configured.arguments, *self.arguments]
        return await run_in_foreground(command, client_environment(configured.environment))


async def run_in_foreground(command: Sequence[str], environment: dict[str, str]) -> int:
    """Give the terminal to a program until it ends; its status as a shell tells it.

    Ctrl-C in a terminal reaches the program by itself. Any other SIGINT, and SIGTERM and SIGHUP,
    were meant for it as well, and are passed on.

    Raises:
        ConfigError: it can't be executed.
    """
    loop = asyncio.get_running_loop()
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as error:
        raise ConfigError(f"{command[0]} can't be started: {error.strerror}.") from error

    def pass_on(number: int) -> None:
        if number != signal.SIGINT or not sys.stdin.isatty():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, pass_on, number)
    try:
        status = await process.wait()
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
    return status if status >= 0 else _SIGNALLED - status


def spared_between(before: dict[str, Any], after: dict[str, Any]) -> Spared:
    """The difference of two of a gateway's accounts."""
    one, other = before["totals"]["ever"], after["totals"]["ever"]
    change = {name: other[name] - one[name] for name in one}
    return Spared(
        requests=int(change["requests"]),
        prompt_tokens=int(change["warm_tokens"] + change["cold_tokens"]),
        warm_tokens=int(change["warm_tokens"]),
        seconds=float(change["spared_s"]),
    )
