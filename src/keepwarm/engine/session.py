"""An engine for the length of one command: started if need be, reached, and ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from keepwarm.engine.attach import plan_launch
from keepwarm.engine.client import EngineClient
from keepwarm.engine.launch import Launch
from keepwarm.engine.process import EngineProcess
from keepwarm.errors import EngineStartError, UnknownFlagError
from keepwarm.settings import EngineSettings

_POLL_S = 0.03


async def wait_ready(
    client: EngineClient, process: EngineProcess | None, *, timeout_s: float
) -> None:
    """Wait until an engine has loaded its model.

    Raises:
        EngineStartError: it ended, or took too long; the message holds its last lines.
    """
    deadline = time.monotonic() + timeout_s
    while not await client.health():
        if process and process.exited.is_set():
            raise process.failure()
        if time.monotonic() > deadline:
            lines = process.last_lines if process else "(not started by Keepwarm)"
            raise EngineStartError(
                f"The engine's model was not loaded within {timeout_s:.0f} s "
                f"(engine.start_timeout_s). Its last lines:\n{lines}"
            )
        await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def engine_session(
    settings: EngineSettings, *, on_line: Callable[[str], None] | None = None
) -> AsyncIterator[tuple[EngineClient, Launch]]:
    """A loaded engine for looking at a model: nothing is saved or restored.

    Raises:
        KeepwarmError: as `plan_launch` and `wait_ready`.
    """
    with TemporaryDirectory(prefix="keepwarm-") as scratch:
        launch = await plan_launch(settings, slot_dir=Path(scratch), saves=False)
        client = EngineClient(launch.base_url, api_key=settings.upstream_key or None)
        process = launch.process()
        try:
            while True:
                if process:
                    await process.start(on_line)
                try:
                    await wait_ready(client, process, timeout_s=settings.start_timeout_s)
                except UnknownFlagError as error:
                    launch = launch.without(error)
                    process = launch.process()
                else:
                    break
            yield client, launch
        finally:
            if process:
                await process.stop()
