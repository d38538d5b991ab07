"""Who may send: tasks beside one another, or one that may have ended the engine, alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Floor:
    """See the module. Whoever wants it alone goes first; for one event loop."""

    def __init__(self) -> None:
        self._beside = 0
        self._is_alone = False
        self._waiting = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, *, alone: bool) -> AsyncIterator[None]:
        """Wait for it, and have it."""
        self._waiting += alone
        try:
            while self._is_alone or (self._beside if alone else self._waiting):
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._waiting -= alone
            self._changed.set()
        self._is_alone = alone
        self._beside += not alone
        try:
            yield
        finally:
            self._is_alone = False if alone else self._is_alone
            self._beside -= not alone
            self._changed.set()
