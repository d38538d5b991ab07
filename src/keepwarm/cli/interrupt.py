"""Run a command's work so that whatever ends it, its servers are ended too."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

import typer

from keepwarm.cli.output import err

T = TypeVar("T")


def run_until_interrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; Ctrl-C, SIGTERM and a closed terminal cancel it and let it clean up.

    Raises:
        typer.Exit: it was interrupted; status 130, as after Ctrl-C.
    """

    async def main() -> T:
        task = asyncio.current_task()
        assert task
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError) as interrupted:
        err.print("interrupted: everything that was started has been ended")
        raise typer.Exit(130) from interrupted
