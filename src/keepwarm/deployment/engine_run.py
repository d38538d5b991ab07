"""One engine under Keepwarm: its process, if it is one of ours, and the client that reaches it."""

from __future__ import annotations

import logging

from keepwarm.engine.attach import plan_launch
from keepwarm.engine.beginning import Beginning, start_process
from keepwarm.engine.client import EngineClient
from keepwarm.engine.launch import Launch
from keepwarm.engine.process import EngineProcess
from keepwarm.engine.session import wait_ready
from keepwarm.errors import UnknownFlagError
from keepwarm.settings import EngineSettings

log = logging.getLogger("keepwarm")


class EngineRun:
    """An engine that is started, renewed and ended. `process` None: attached, or not running."""

    def __init__(
        self, settings: EngineSettings, launch: Launch, process: EngineProcess | None = None
    ) -> None:
        """Take what to run; `process` is one that was begun already."""
        self._settings = settings
        self.launch = launch
        self.process = process
        self.is_asleep = False
        self.client = EngineClient(
            launch.base_url,
            api_key=settings.upstream_key or None,
            opens_ahead=launch.attached is None,
        )

    @classmethod
    async def planned(cls, settings: EngineSettings, begun: Beginning) -> EngineRun:
        """Decide which engine it is, unless that was done.

        Raises:
            ConfigError, ModelError, EngineStartError: as `plan_launch`.
        """
        launch = begun.launch or await plan_launch(
            settings, slot_dir=begun.staging, tier_chars=begun.tier_chars
        )
        return cls(settings, launch, begun.process)

    @property
    def pid(self) -> int | None:
        """The engine's process id, None for an attached one."""
        return self.process.pid if self.process else None

    @property
    def is_gone(self) -> bool:
        """Whether it is one of ours whose process has ended."""
        return self.process is not None and self.process.exited.is_set()

    @property
    def may_sleep(self) -> bool:
        """Whether the engine may unload its model by itself (`--sleep-idle-seconds`)."""
        options = self.launch.options
        return options is None or "--sleep-idle-seconds" in options.extra

    def falls_asleep(self) -> bool:
        """Note that it has unloaded its model; whether that is news. Its slots are empty then."""
        was_asleep, self.is_asleep = self.is_asleep, True
        if not was_asleep:
            log.info("the engine sleeps: its slots are empty, the next request loads its model")
        return not was_asleep

    async def start(self) -> None:
        """Start a process, unless one was begun, and wait until its model is loaded.

        Raises:
            EngineStartError: it ended, or took too long.
        """
        while True:
            if self.process is None:
                self.process = await start_process(self.launch)
            try:
                timeout_s = self._settings.start_timeout_s
                await wait_ready(self.client, self.process, timeout_s=timeout_s)
            except UnknownFlagError as error:
                self.launch = self.launch.without(error)
                await self.stop()
            else:
                return

    async def stop(self) -> None:
        """End the process, if it is one of ours."""
        if self.process:
            await self.process.stop()
            self.process = None

    async def renew(self) -> None:
        """End it at once, and start another.

        Raises:
            EngineStartError: as `start`.
        """
        if self.process and not self.is_gone:
            self.process.kill()
        await self.stop()
        await self.start()
