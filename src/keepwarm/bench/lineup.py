"""The servers of one run: made from one set of settings, and each ended when the run ends."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from keepwarm.bench.arms import KEEPWARM, NO_CACHE, Arm
from keepwarm.bench.client import ChatClient
from keepwarm.bench.servers import KeepwarmServer, Server, Workplace, bare_engine
from keepwarm.engine.options import EngineOptions
from keepwarm.settings import Settings


class Lineup:
    """Makes servers for one run and sees to it that each is ended."""

    def __init__(
        self, settings: Settings, options: EngineOptions, place: Workplace, stack: AsyncExitStack
    ) -> None:
        self._settings = settings
        self._options = options
        self._place = place
        self._stack = stack
        self._client = ChatClient()
        stack.push_async_callback(self._client.close)
        binary = settings.engine.binary
        self._binary = Path(binary).expanduser() if binary else None
        self.keepwarm = Arm(KEEPWARM, self._keepwarm(settings), self._client)

    def arm(self, name: str) -> Arm:
        """An arm by name; its server isn't started yet."""
        if name == KEEPWARM:
            return self.keepwarm
        server = bare_engine(
            self._options,
            binary=self._binary,
            client=self._client,
            defaults=True,
            plain=name == NO_CACHE,
        )
        return Arm(name, self._ended(server), self._client)

    def single_slot(self) -> Arm:
        """A Keepwarm with one slot over the same store; only one of the two may run."""
        engine = msgspec.structs.replace(self._settings.engine, slots=1)
        settings = msgspec.structs.replace(self._settings, engine=engine)
        return Arm(KEEPWARM, self._keepwarm(settings), self._client)

    def ahead(self, name: str, is_on: bool) -> Arm:
        """A Keepwarm that prefills the next turn while nobody asks, or doesn't; its own store."""
        engine = msgspec.structs.replace(self._settings.engine, ahead="auto" if is_on else "off")
        settings = msgspec.structs.replace(self._settings, engine=engine)
        return Arm(name, self._keepwarm(settings, f"store-{is_on}"), self._client)

    def engine_alone(self) -> Server:
        """The engine with Keepwarm's flags and nothing around it."""
        server = bare_engine(
            self._options, binary=self._binary, client=self._client, defaults=False
        )
        return self._ended(server)

    def _keepwarm(self, settings: Settings, store_name: str = "store") -> KeepwarmServer:
        store = self._place.store(store_name)
        changed = msgspec.structs.replace(
            settings.store, dir=str(store), staging_dir=str(self._place.staging(store))
        )
        server = KeepwarmServer(
            msgspec.structs.replace(settings, store=changed),
            directory=self._place.root,
            client=self._client,
        )
        self._ended(server)
        return server

    def _ended(self, server: Server) -> Server:
        self._stack.push_async_callback(server.stop)
        return server
