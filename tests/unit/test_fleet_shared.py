"""The shared store on obstore: a directory, an S3-compatible server, and what happens when away."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.fleet.shared import LONGEST_PAUSE_S, PAUSE_S, Pace, SharedStore, open_shared

NOT_INSTALLED = "the fleet extra isn't installed (pip install 'keepwarm[fleet]')"


def opened(url: str, *, timeout_s: float = 5.0, **options: str) -> SharedStore:
    pytest.importorskip("obstore", reason=NOT_INSTALLED)
    return open_shared(
        url,
        options=options,
        upload_bytes_per_s=0,
        download_bytes_per_s=0,
        timeout_s=timeout_s,
        allow_http=True,
    )


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """An S3-compatible server on a free port, with an empty bucket."""
    pytest.importorskip("obstore", reason=NOT_INSTALLED)
    server = pytest.importorskip("moto.server", reason="moto[server] isn't installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    boto3 = pytest.importorskip("boto3")
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y"}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="warm")
    try:
        yield {"endpoint": url, "region": "us-east-1", **keys}
    finally:
        running.stop()


async def _holds_what_is_put(shared: SharedStore) -> None:
    assert await shared.get("a/b/c") is None
    assert not await shared.has("a/b/c")
    data = os.urandom(12_000_000)  # several parts, where the store splits what is large
    assert await shared.put("a/b/c", [data[:5], memoryview(data)[5:]]) == len(data)
    assert await shared.has("a/b/c")
    found = await shared.get("a/b/c")
    assert found is not None
    assert bytes(found) == data
    assert not shared.is_away
    assert shared.counts.read_bytes == shared.counts.written_bytes == len(data)


async def test_a_directory_holds_what_is_put_and_is_private(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "shared"
    await _holds_what_is_put(opened(str(place)))
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


async def test_an_s3_bucket_holds_what_is_put(s3: dict[str, str]) -> None:
    await _holds_what_is_put(opened("s3://warm/prefix", **s3))


async def test_a_server_that_is_gone_is_left_alone_for_a_while(s3: dict[str, str]) -> None:
    gone = {**s3, "endpoint": "http://127.0.0.1:9"}
    shared = opened("s3://warm", timeout_s=2.0, **gone)
    for _ in range(2):
        with pytest.raises(SnapshotError) as caught:
            await shared.get("a")
        assert caught.value.reason == "away"
    assert shared.is_away
    assert shared.counts.failures == 1  # the second wasn't even tried


class Stub:
    """Stands in for the library's functions; says what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def get_async(self, _: Any, __: str) -> Any:
        if callable(self.answer):
            return await self.answer()
        raise self.answer

    head_async = get_async


def stubbed(answer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[SharedStore, list[float]]:
    pytest.importorskip("obstore", reason=NOT_INSTALLED)
    now = [100.0]
    shared = SharedStore(None, timeout_s=0.05, clock=lambda: now[0])
    monkeypatch.setattr(shared, "_library", Stub(answer))
    return shared, now


async def test_pauses_double_while_a_store_stays_away_and_end_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, now = stubbed(OSError("no route"), monkeypatch)
    pauses = []
    for _ in range(9):
        with pytest.raises(SnapshotError, match="no route"):
            await shared.has("a")
        began = now[0]
        while shared.is_away:
            now[0] += PAUSE_S / 2
        pauses.append(now[0] - began)
    assert pauses[:3] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    monkeypatch.setattr(shared, "_library", Stub(FileNotFoundError()))
    assert not await shared.has("a")
    monkeypatch.setattr(shared, "_library", Stub(OSError("again")))
    with pytest.raises(SnapshotError):
        await shared.has("a")
    now[0] += PAUSE_S
    assert not shared.is_away


async def test_a_store_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang() -> None:
        await asyncio.sleep(60)

    shared, _ = stubbed(hang, monkeypatch)
    with pytest.raises(SnapshotError) as caught:
        await shared.get("a")
    assert caught.value.reason == "away"
    assert shared.is_away


async def test_a_bandwidth_limit_of_our_own_is_no_fault_of_the_stores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Found:
        meta: ClassVar = {"size": 3_000}

        async def bytes_async(self) -> bytes:
            return bytes(3_000)

    async def found() -> Found:
        return Found()

    pytest.importorskip("obstore", reason=NOT_INSTALLED)
    shared = SharedStore(None, timeout_s=0.05, download_bytes_per_s=10_000)
    monkeypatch.setattr(shared, "_library", Stub(found))
    for _ in range(3):  # the third waits for 0.35 s, seven times the time limit
        assert await shared.get("a", size_bytes=3_000) == bytes(3_000)
    assert not shared.is_away


async def test_a_transfer_that_is_too_large_for_the_limit_is_slow_and_the_store_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang() -> None:
        await asyncio.sleep(60)

    shared, _ = stubbed(hang, monkeypatch)
    monkeypatch.setattr("keepwarm.fleet.shared.SLOWEST_BYTES_PER_S", 1e9)
    with pytest.raises(SnapshotError) as caught:
        await shared.get("a", size_bytes=50_000_000)
    assert caught.value.reason == "slow"
    assert not shared.is_away


def test_bytes_are_spread_over_time() -> None:
    now = [10.0]
    pace = Pace(1000.0, clock=lambda: now[0])
    waits = [pace.delay_s(250) for _ in range(5)]
    # A quarter of a second's worth may go at once, the rest by and by.
    assert waits == [0.0, 0.0, 0.25, 0.5, 0.75]
    now[0] += 100
    assert pace.delay_s(10) == 0.0
    assert Pace(0.0).delay_s(1 << 40) == 0.0


def test_a_url_that_can_not_be_used_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for url in ("what://is/this", str(file / "below")):
        with pytest.raises(ConfigError, match="can't be used"):
            opened(url)
