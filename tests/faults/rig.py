"""A running gateway over the fake engine, and a client of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from fakeengine import FakeEngine

from keepwarm.core.slots import SlotState
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.life import Life

QUESTION = "What is the state of the backup disk?"


@dataclass
class Keepwarm:
    """A running gateway over the fake engine."""

    engine: FakeEngine
    life: Life
    base: str
    session: aiohttp.ClientSession

    @property
    def deployment(self) -> Deployment:
        return self.life.deployment

    def body(self, text: str = QUESTION, **changes: Any) -> dict[str, Any]:
        return {
            "model": "minimal",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 8,
            **changes,
        }

    async def ask(
        self, text: str = QUESTION, *, headers: dict[str, str] | None = None, **changes: Any
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers in lower case, and the decoded body of one whole chat request."""
        body = self.body(text, **changes)
        url = f"{self.base}/v1/chat/completions"
        async with self.session.post(url, json=body, headers=headers) as response:
            told = {k.lower(): v for k, v in response.headers.items()}
            return response.status, told, await response.json()

    async def ask_streamed(self, text: str = QUESTION, **changes: Any) -> tuple[int, str]:
        """Status and text of one streamed chat request."""
        body = self.body(text, stream=True, **changes)
        url = f"{self.base}/v1/chat/completions"
        async with self.session.post(url, json=body) as response:
            return response.status, (await response.read()).decode()

    async def metrics(self) -> str:
        async with self.session.get(f"{self.base}/metrics") as response:
            return await response.text()

    async def occupy(self) -> None:
        """Give all slots to long conversations of their own, so that a tier must be restored."""
        for slot in range(len(self.engine.slots)):
            prompt = list(range(1000 * slot, 1000 * slot + 500))
            body = {"prompt": prompt, "max_tokens": 4}
            async with self.session.post(f"{self.base}/completion", json=body) as response:
                assert response.status == 200
        await self.settled()

    async def counted(self, line: str) -> None:
        """Wait until the metrics have this line."""
        async with asyncio.timeout(10):
            while f"\n{line}\n" not in await self.metrics():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def settled(self) -> None:
        """Wait until no slot is given out and no request is known any more."""
        scheduler = self.deployment.dispatcher.scheduler
        await until(lambda: not (scheduler.jobs or scheduler.busy or self.engine.busy))
        assert all(s.state is SlotState.IDLE and s.job is None for s in scheduler.slots)
        dispatcher = self.deployment.dispatcher
        assert not dispatcher._waiting
        assert not dispatcher._bodies
        assert not dispatcher._fills


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds; a test that waits for ever fails."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing here sets an event
            await asyncio.sleep(0.005)
