"""A process of ours: its environment, its log, its end."""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import pytest

from keepwarm.engine import process as process_module
from keepwarm.engine.process import EngineProcess

TIMEOUT_S = 20


def running(code: str, **given: dict[str, str]) -> EngineProcess:
    return EngineProcess([sys.executable, "-c", code], port=1, **given)


async def ended(process: EngineProcess) -> str:
    async with asyncio.timeout(TIMEOUT_S):
        await process.exited.wait()
    await process.stop()
    return process.last_lines


async def test_its_last_words_are_there_when_it_has_ended() -> None:
    code = "import sys; [print(f'line {i}', file=sys.stderr) for i in range(90)]; sys.exit(3)"
    process = running(code)
    await process.start()
    lines = (await ended(process)).split("\n")
    assert (len(lines), lines[-1]) == (40, "line 89")
    assert "status 3" in str(process.failure())


async def test_half_a_line_at_the_end_is_a_line() -> None:
    process = running("import sys; sys.stderr.write('whole\\nhalf')")
    await process.start()
    assert await ended(process) == "whole\nhalf"


async def test_a_log_in_pieces_is_read_some_at_a_time() -> None:
    code = """
import sys, time
for _ in range(40):
    sys.stderr.write("piece "); sys.stderr.flush(); time.sleep(0.01)
"""
    reads = 0
    process = running(code)
    began_s = time.monotonic()
    await process.start()
    assert process._transport
    child = process._transport.get_protocol()
    received = child.pipe_data_received

    def counted(fd: int, data: bytes) -> None:
        nonlocal reads
        reads += 1
        received(fd, data)

    child.pipe_data_received = counted  # type: ignore[method-assign]
    assert (await ended(process)).count("piece") == 40
    # On a machine under load the pieces come more slowly; at each end there is one read more, and
    # the line that has no end is the last.
    assert reads <= (time.monotonic() - began_s) / process_module._READ_EVERY_S + 3


@pytest.mark.parametrize(("own", "expected"), [(None, "ours"), ("theirs", "theirs")])
async def test_the_users_environment_goes_before_ours(
    own: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        monkeypatch.setenv("SPINS", own)
    code = "import os, sys; sys.stderr.write(os.environ['SPINS'])"
    process = running(code, environment={"SPINS": "ours"})
    await process.start()
    assert await ended(process) == expected


async def test_it_is_ended_while_it_runs_and_its_log_is_full() -> None:
    process = running("import sys\nwhile True: sys.stderr.write('x' * 4096)")
    await process.start()
    async with asyncio.timeout(TIMEOUT_S):
        await process.stop()
    assert process.exited.is_set()
    assert process._transport
    assert process._transport.get_returncode() == -signal.SIGTERM
