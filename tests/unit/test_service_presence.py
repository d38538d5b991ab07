"""What systemd is told, read from a socket as systemd would read it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.sdnotify import Notifier, message
from keepwarm.service.presence import Presence
from keepwarm.settings import service_manager


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def _presence(listener: socket.socket, *, watchdog_s: float | None = None) -> Presence:
    return Presence(
        Notifier(listener.getsockname()), watchdog_s=watchdog_s, load_s=900.0, stop_s=90.0
    )


def _said(listener: socket.socket) -> list[dict[str, str]]:
    out = []
    while True:
        try:
            lines = listener.recv(8192).decode().split("\n")
        except BlockingIOError:
            return out
        out.append(dict(line.split("=", 1) for line in lines))


def test_a_status_line_cannot_begin_another_key() -> None:
    assert message(status="one\nREADY=1") == b"STATUS=one READY=1"


def test_a_long_status_is_cut_between_characters() -> None:
    text = message(status="ä" * 2000).decode()
    assert len(text.encode()) <= 1024 + len("STATUS=")


def test_progress_asks_for_more_time_until_ready_and_not_after(listener: socket.socket) -> None:
    presence = _presence(listener)
    presence.status("standard: 512 of 2,012 tokens")
    presence.ready()
    presence.status("loading the model")
    before, ready, after = _said(listener)
    assert before == {
        "EXTEND_TIMEOUT_USEC": "300000000",
        "STATUS": "standard: 512 of 2,012 tokens",
    }
    assert ready == {"READY": "1", "WATCHDOG": "1"}
    assert after == {"STATUS": "loading the model"}


def test_loading_may_take_as_long_as_the_settings_say(listener: socket.socket) -> None:
    _presence(listener).status("loading the model")
    assert _said(listener)[0]["EXTEND_TIMEOUT_USEC"] == "1200000000"


def test_stopping_asks_for_the_time_that_saving_takes(listener: socket.socket) -> None:
    presence = _presence(listener)
    presence.ready()
    presence.stopping()
    assert _said(listener)[-1] == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "90000000"}


async def test_pings_go_on_while_alive_and_end_when_not(listener: socket.socket) -> None:
    presence = _presence(listener, watchdog_s=0.002)
    alive = True
    looked: asyncio.Queue[None] = asyncio.Queue()

    def is_alive() -> bool:
        looked.put_nowait(None)
        return alive

    async def look(times: int) -> None:
        for _ in range(times):
            await looked.get()

    task = asyncio.create_task(presence.ping(is_alive))
    await look(5)
    assert {"WATCHDOG": "1"} in _said(listener)
    alive = False
    await look(5 + looked.qsize())
    _said(listener)
    await look(5)
    assert _said(listener) == []
    task.cancel()


async def test_a_ping_repeats_ready_so_that_a_lost_datagram_does_not_matter(
    listener: socket.socket,
) -> None:
    presence = _presence(listener)
    presence.ready()
    _said(listener)
    task = asyncio.create_task(presence.ping(lambda: True))
    await asyncio.sleep(0)
    task.cancel()
    assert _said(listener) == [{"READY": "1", "WATCHDOG": "1"}]


async def test_without_systemd_nothing_is_sent_and_no_task_stays() -> None:
    presence = Presence(Notifier(None), watchdog_s=None, load_s=1, stop_s=1)
    presence.ready()
    await presence.ping(lambda: True)


def test_a_socket_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "nobody"))
    notifier.send(message(ready=True))
    assert notifier


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"keepwarm-test-{os.getpid()}"
        listener.bind("\0" + name)
        Notifier("@" + name).send(message(ready=True))
        assert listener.recv(100) == b"READY=1"


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert service_manager().watchdog_s == 30.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert service_manager().watchdog_s is None
    assert service_manager().notify_socket == "/run/x"
