"""Where a deployment is in its life, and who may ask it for something meanwhile.

| state | what happens | next |
|---|---|---|
| starting | the engine loads its model | warming |
| warming | prefixes are restored or prefilled | ready |
| ready | requests are served | down, stopping |
| down | the engine died: requests wait for the next one | warming, failed |
| failed | it died too often: requests are refused, a start is tried now and then | warming |
| stopping | requests are refused, slots are saved | (the end) |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from keepwarm.errors import DeadlineError, EngineDownError, KeepwarmError


class State(StrEnum):
    """See the module."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DOWN = "down"
    FAILED = "failed"
    STOPPING = "stopping"


class Condition:
    """A deployment's state, a line about it, and why it is down."""

    def __init__(self, on_status: Callable[[str], None] | None) -> None:
        """Start; `on_status` is told each new line."""
        self._state = State.STARTING
        self.status = "starting"
        self.failure: KeepwarmError | None = None
        self._on_status = on_status
        self._was_ready = asyncio.Event()

    @property
    def state(self) -> State:
        """See the module."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        # An engine that dies, or comes back, while Keepwarm stops must not let requests in again.
        if self._state is not State.STOPPING:
            self._state = state

    def tell(self, status: str) -> None:
        """Say what is being done, in a line."""
        self.status = status
        if self._on_status:
            self._on_status(status)

    def set_ready(self) -> None:
        """All is warm: whoever waited goes on."""
        self.state = State.READY
        self.failure = None
        self._was_ready.set()

    async def admitted(self, *, timeout_s: float) -> None:
        """Wait until requests are served.

        Raises:
            EngineDownError: the circuit is open, or Keepwarm is stopping.
            DeadlineError: it took too long.
        """
        if self.state is State.READY or self.state is State.DOWN:
            return
        if self.state in (State.FAILED, State.STOPPING):
            raise EngineDownError(self.why_down())
        try:
            await asyncio.wait_for(self._was_ready.wait(), timeout_s)
        except TimeoutError as error:
            raise DeadlineError("Keepwarm wasn't ready within the time allowed.") from error

    def why_down(self) -> str:
        """For clients: why nothing is served. The engine's own lines are for the log."""
        why = str(self.failure or "Keepwarm is stopping.").partition(" Its last lines:")[0]
        return f"The engine isn't available. {why}"
