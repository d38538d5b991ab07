"""How the snapshot store behaves with very many extents, and whether packs would be better.

    python -m benchmarks.store_scale --extents 100000 --dir DIR

Fills a store with conversations through the same code as the gateway (only flushes are left out
while filling), then measures with flushes: opening, look-up, a save, an assembly, an eviction. Next
to that, the same payloads appended to packs (a few large files), and how long the event loop is
held up by one real-size save. Everything is removed again. Writes one JSON object to the
standard output. Needs about 1.5 GB of disk for 100,000 extents, and no model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from keepwarm.core.memory import MemoryKind
from keepwarm.core.tree import Tokens
from keepwarm.slotfile import CacheLayout, Layout, RowsPart, TensorLayout, assemble
from keepwarm.store.disk import Disk
from keepwarm.store.intake import Why
from keepwarm.store.shelf import Shelf, ShelfSettings
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.store import Store
from keepwarm.store.types import KeptMark, Origin

TIER_TOKENS = 200
TURN_TOKENS = 40
TURNS = 20
PACK_BYTES = 256 << 20

Job: TypeAlias = Coroutine[Any, Any, object]

# 200 bytes a token, so that 100,000 extents of a turn's 40 tokens are 800 MB.
SMALL = Layout(
    4,
    MemoryKind.PLAIN,
    CacheLayout(False, (0, 0), (TensorLayout(1, 50),) * 2, (TensorLayout(1, 50),) * 2),
)
# SmolLM2-135M: 30 layers, 3 KV heads of 64 elements, f16.
SMOLLM2 = Layout(
    4,
    MemoryKind.PLAIN,
    CacheLayout(False, (0, 0), (TensorLayout(1, 384),) * 30, (TensorLayout(1, 384),) * 30),
)


class FillingDisk(Disk):
    """No flushes: a fill that loses power is simply started again."""

    def sync_file(self, fd: int) -> None:
        """Nothing."""

    def sync_dir(self, path: Path) -> None:
        """Nothing."""

    def commit(self, connection: sqlite3.Connection) -> None:
        """Commit, and from then on don't flush the log."""
        super().commit(connection)
        connection.execute("PRAGMA synchronous=OFF")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    median_ms: float
    p99_ms: float
    max_ms: float


def spread(seconds: list[float]) -> Percentiles:
    """Median, 99th percentile and maximum of some times."""
    times = sorted(1000 * s for s in seconds)
    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
    return Percentiles(round(statistics.median(times), 4), round(p99, 4), round(times[-1], 4))


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def digest_of(tokens: Tokens) -> bytes:
    """Stands for a request's digest."""
    return struct.pack("<qq", hash(tokens.tobytes()), tokens.size)


class Workload:
    """Conversations that continue one of three tiers, turn by turn, from ten tenants."""

    def __init__(self, layout: Layout, *, seed: int = 0, largest_bytes: int = 48 << 20) -> None:
        self.layout = layout
        self._random = random.Random(seed)  # noqa: S311
        size = largest_bytes + (16 << 20)
        self._bytes = np.random.default_rng(seed).integers(0, 256, size, np.uint8)

    def tokens(self, count: int) -> Tokens:
        """Random token ids."""
        return np.array([self._random.randrange(50_000) for _ in range(count)], np.int32)

    def conversations(self, saves: int) -> Iterator[tuple[str, Tokens]]:
        """Namespace and tokens of each save, in the order in which they are made."""
        tiers = [self.tokens(TIER_TOKENS) for _ in range(3)]
        for tier in tiers:
            yield "", tier
        done = len(tiers)
        while done < saves:
            tokens = self._random.choice(tiers)
            namespace = f"tenant-{self._random.randrange(10)}"
            for _ in range(min(TURNS, saves - done)):
                tokens = np.concatenate([tokens, self.tokens(TURN_TOKENS)])
                yield namespace, tokens
                done += 1

    def slot_file(self, tokens: Tokens) -> bytes:
        """A slot file of these tokens with random rows."""
        size = self.layout.rows_bytes(tokens.size)
        at = self._random.randrange(self._bytes.size - size)
        part = RowsPart(self._bytes[at : at + size], 0, tokens.size, tokens.size)
        pieces = assemble(self.layout, tokens=tokens, parts=[part], boundary=None, streams=1)
        return b"".join(bytes(piece) for piece in pieces)

    def save(self, snapshots: Snapshots, namespace: str, tokens: Tokens) -> float:
        """Save as the engine and the gateway would; returns the seconds that the store took."""
        file = self.slot_file(tokens)
        name = snapshots.staging.expect(len(file))
        snapshots.staging.path(name).write_bytes(file)
        ends = (tokens.size - TURN_TOKENS // 2, tokens.size)
        marks = [KeptMark(digest_of(tokens[:end]), end) for end in ends]
        why = Why(namespace, marks, Origin.CONVERSATION, tokens.size / 200)
        return timed(lambda: snapshots.absorb(name, why, expected_tokens=None, now_s=time.time()))


def settings_in(base: Path, staging: Path, layout: Layout) -> ShelfSettings:
    """A store that evicts nothing by itself."""
    return ShelfSettings(
        root=base / "store",
        fingerprint="store_scale",
        layout=layout,
        quota_bytes=4 << 30,
        staging=staging,
        staging_bytes=256 << 20,
        streams=1,
        max_tokens=1 << 20,
        owner="benchmarks.store_scale",
    )


def bytes_on_disk(path: Path) -> int:
    """What `du` counts."""
    return sum(p.stat().st_blocks * 512 for p in path.rglob("*") if p.is_file())


def measure_files(base: Path, staging: Path, *, extents: int) -> dict[str, object]:
    """One file an extent, as the store does it."""
    work = Workload(SMALL)
    settings = settings_in(base, staging, SMALL)
    filling = Snapshots(settings, disk=FillingDisk(), now_s=time.time())
    saves = list(work.conversations(extents))
    fill_s = timed(lambda: [work.save(filling, *given) for given in saves])
    filling.close()

    begin, begin_cpu = time.perf_counter(), time.process_time()
    snapshots = Snapshots(settings, disk=Disk(), now_s=time.time())
    open_s, open_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    shelf = snapshots.shelf
    listing_s = timed(shelf.files.present)
    picked = random.Random(1).sample(saves[3:], 1000)  # noqa: S311
    chains = [
        (namespace, [digest_of(tokens[:end]) for end in range(TIER_TOKENS, tokens.size + 1, 20)])
        for namespace, tokens in picked
    ]
    hits = [
        timed(lambda n=n, d=d: snapshots.lookup(d, ("", n)))  # type: ignore[misc]
        for n, d in chains
    ]
    misses = [
        timed(lambda d=d: snapshots.lookup([x[::-1] for x in d], ("", "tenant-1")))  # type: ignore[misc]
        for _, d in chains
    ]
    assert all(snapshots.lookup(d, ("", n)) is not None for n, d in chains)
    last = [tokens for _, tokens in picked[:200]]
    made = [timed(lambda t=t: materialize(snapshots, t)) for t in last]  # type: ignore[misc]
    again = Workload(SMALL, seed=2)
    durable = [again.save(snapshots, *given) for given in list(again.conversations(203))[3:]]
    row_bytes = SMALL.rows_bytes(TURN_TOKENS)
    evicted = timed(lambda: snapshots.prune(shelf.used_bytes - 1000 * row_bytes))
    verify_s = timed(lambda: check_some(shelf))
    found: dict[str, object] = {
        "load_average": os.getloadavg(),
        "extents": len(shelf.catalog.tree),
        "marks": shelf.catalog.mark_count,
        "payload_bytes": shelf.catalog.used_bytes,
        "disk_bytes": bytes_on_disk(shelf.files.root),
        "index_bytes": bytes_on_disk(settings.root) - bytes_on_disk(shelf.files.root),
        "fill_s": round(fill_s, 1),
        "open_s": round(open_s, 3),
        "open_cpu_s": round(open_cpu_s, 3),
        "of_which_listing_s": round(listing_s, 3),
        "lookup_hit": asdict(spread(hits)),
        "lookup_miss": asdict(spread(misses)),
        "durable_save": asdict(spread(durable)),
        "materialize": asdict(spread(made)),
        "evict_1000_s": round(evicted, 3),
        "verify_1000_s": round(verify_s, 3),
    }
    snapshots.close()
    found["remove_all_s"] = round(timed(lambda: shutil.rmtree(settings.root)), 1)
    return found


def check_some(shelf: Shelf) -> None:
    """Read a thousand of the extents again."""
    ids = [extent.id for extent in shelf.catalog.tree]
    for extent_id in random.Random(3).sample(ids, 1000):  # noqa: S311
        shelf.files.check_again(shelf.catalog.row(extent_id))


def materialize(snapshots: Snapshots, tokens: Tokens) -> None:
    """Assemble all but the last token, so that no ready file is in the way."""
    for namespace in (f"tenant-{i}" for i in range(10)):
        hit = snapshots.match(tokens[:-1], namespace)
        if hit is not None and hit.at_tokens == tokens.size - 1:
            ready = snapshots.materialize(hit.extent_id, hit.at_tokens)
            snapshots.staging.release(ready.name)
            return


def measure_packs(base: Path, *, extents: int) -> dict[str, object]:
    """The same payloads appended to large files: what a save and a removal would cost."""
    size = SMALL.rows_bytes(TURN_TOKENS)
    payload = os.urandom(size)
    root = base / "packs"
    root.mkdir()
    places: list[tuple[int, int]] = []
    fd = -1
    begin = time.perf_counter()
    for i in range(extents):
        pack, at = divmod(i * size, PACK_BYTES // size * size)
        if at == 0:
            if fd >= 0:
                os.close(fd)
            fd = os.open(root / f"{pack}.pack", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.write(fd, payload)
        places.append((pack, at))
    fill_s = time.perf_counter() - begin

    def append() -> None:
        os.write(fd, payload)
        os.fsync(fd)

    durable = [timed(append) for _ in range(200)]
    os.close(fd)
    listing_s = timed(lambda: list(os.scandir(root)))
    # Making room for one pack, when every second extent in it has been evicted: copy what is left.
    source = root / "0.pack"

    def compact() -> None:
        with source.open("rb") as old, (root / "new.pack").open("wb") as new:
            for _ in range(0, PACK_BYTES // size, 2):
                new.write(old.read(size))
                old.seek(size, os.SEEK_CUR)
            new.flush()
            os.fsync(new.fileno())

    compact_s = timed(compact)
    found: dict[str, object] = {
        "disk_bytes": bytes_on_disk(root),
        "payload_bytes": size * (extents + 200) + (root / "new.pack").stat().st_size,
        "fill_s": round(fill_s, 1),
        "listing_s": round(listing_s, 5),
        "durable_append": asdict(spread(durable)),
        "compact_one_half_empty_pack_s": round(compact_s, 3),
    }
    found["remove_all_s"] = round(timed(lambda: shutil.rmtree(root)), 1)
    return found


def measure_writes(base: Path) -> dict[str, object]:
    """A durable write of one turn's rows, as a file of its own and appended to a pack.

    35 tokens of a 135M model (23 kB each) and of an 8B one (128 KiB each).
    """
    disk = Disk()
    found: dict[str, object] = {}
    for name, size in (("135M", 35 * 23_040), ("8B", 35 * 131_072)):
        payload = os.urandom(size)
        pack = os.open(base / "one.pack", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)

        def write_file(payload: bytes = payload) -> None:
            disk.write_new(base / "one.new", [payload])
            disk.rename(base / "one.new", base / "one.rows")
            disk.sync_dir(base)

        def append(payload: bytes = payload, pack: int = pack) -> None:
            disk.write(pack, [payload])
            disk.sync_file(pack)

        found[name] = {
            "payload_bytes": size,
            "file": asdict(spread([timed(write_file) for _ in range(40)])),
            "pack": asdict(spread([timed(append) for _ in range(40)])),
        }
        os.close(pack)
        for leftover in ("one.rows", "one.pack"):
            (base / leftover).unlink()
    return found


class Ticker:
    """Measures how late a timer of the running event loop is."""

    def __init__(self) -> None:
        self.late: list[float] = []

    async def during(self, work: Awaitable[object]) -> None:
        """Tick every half millisecond until `work` is done."""
        doing = asyncio.ensure_future(work)
        while not doing.done():
            due = time.perf_counter() + 0.0005
            await asyncio.sleep(0.0005)
            self.late.append(time.perf_counter() - due)
        await doing

    def told(self) -> dict[str, object]:
        """How late, and in how many of a thousand ticks by more than 2 ms."""
        over = sum(late > 0.002 for late in self.late)
        return asdict(spread(self.late)) | {
            "ticks": len(self.late),
            "over_2_ms_per_1000": round(1000 * over / len(self.late), 1),
        }


async def save_and_assemble(store: Store, work: Workload) -> AsyncIterator[tuple[str, Job]]:
    """Ten times a save of 2,000 tokens, then the assembly of 1,999; the caller awaits the jobs."""
    staging = store.settings.staging
    for _ in range(10):
        tokens = work.tokens(2000)
        file = work.slot_file(tokens)
        name = await store.new_save(len(file))
        (staging / name).write_bytes(file)
        marks = [KeptMark(digest_of(tokens), tokens.size)]
        yield (
            "save",
            store.absorb(
                name, namespace="", marks=marks, origin=Origin.CONVERSATION, prefill_s=9.3
            ),
        )
        hit = store.lookup([marks[0].digest], namespace="")
        assert hit is not None
        yield "assemble", store.materialize(hit.extent_id, 1999)
        for ready in list(staging.iterdir()):
            store.release(ready.name)


def in_another_process(base: Path, staging: Path, begun: Event, go_on: Event) -> None:
    """The same saves and assemblies, for the control; each waits to be told."""

    async def run() -> None:
        store = await Store.open(settings_in(base, staging, SMOLLM2))
        async for _, job in save_and_assemble(store, Workload(SMOLLM2)):
            begun.set()
            await job
            begun.clear()
        await store.close()
        go_on.set()
        begun.set()

    asyncio.run(run())


async def measure_loop(base: Path, staging: Path) -> dict[str, object]:
    """How late the event loop is while 2,000 tokens are saved and assembled beside it.

    As a control, the same is done by another process: what is late then, the machine is to blame
    for, not the interpreter's lock.
    """
    idle, tickers = Ticker(), {"save": Ticker(), "assemble": Ticker()}
    await idle.during(asyncio.sleep(1.0))
    store = await Store.open(settings_in(base / "own", staging, SMOLLM2))
    seconds: dict[str, list[float]] = {"save": [], "assemble": []}
    async for name, job in save_and_assemble(store, Workload(SMOLLM2)):
        begin = time.perf_counter()
        await tickers[name].during(job)
        seconds[name].append(time.perf_counter() - begin)
    await store.close()

    spawn = multiprocessing.get_context("spawn")
    begun, over = spawn.Event(), spawn.Event()
    args = (base / "other", staging, begun, over)
    other = spawn.Process(target=in_another_process, args=args)
    other.start()
    control = Ticker()
    while other.is_alive() and not over.is_set():
        if begun.is_set():
            await control.during(asyncio.sleep(0.002))
        else:
            await asyncio.sleep(0.001)
    other.join()
    if other.exitcode:
        raise SystemExit("the control failed")
    return {
        "save_2000_tokens": asdict(spread(seconds["save"])),
        "assemble_1999_tokens": asdict(spread(seconds["assemble"])),
        "late_idle": idle.told(),
        "late_while_saving": tickers["save"].told(),
        "late_while_assembling": tickers["assemble"].told(),
        "late_while_another_process_does_both": control.told(),
    }


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description="Measure the snapshot store at scale.")
    parser.add_argument("--extents", type=int, default=100_000)
    parser.add_argument("--dir", type=Path, default=None, help="on the disk to be measured")
    given = parser.parse_args()
    memory = Path("/dev/shm")  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-scale-", dir=given.dir) as directory,
        tempfile.TemporaryDirectory(
            prefix="keepwarm-scale-", dir=memory if memory.is_dir() else given.dir
        ) as staging,
    ):
        base = Path(directory)
        found = {
            "writes": measure_writes(base),
            "loop": asyncio.run(measure_loop(base / "loop", Path(staging))),
            "packs": measure_packs(base, extents=given.extents),
            "files": measure_files(base, Path(staging), extents=given.extents),
        }
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
