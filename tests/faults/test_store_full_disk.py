"""A file system that is really full: a start goes on, pruning helps, nothing of anybody's is lost.

Needs the right to mount a tmpfs; skipped where there is none.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepwarm.errors import SnapshotError
from keepwarm.store import KeptMark, Origin, Store
from keepwarm.store.checks import prune_root
from keepwarm.store.shelf import ShelfSettings
from storesamples import PLAIN, allowing, digest_of, opened, restored, save, settings_in, slot_file

TOKENS = list(range(4000))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, *, but_bytes: int = 0) -> Path:
    """Write a file that leaves so much room."""
    ballast = disk / "somebody's film"
    with ballast.open("wb", buffering=0) as file:
        room = os.statvfs(disk)
        file.write(bytes(room.f_bavail * room.f_frsize - but_bytes))
        try:
            while not but_bytes:
                file.write(bytes(512))
        except OSError:
            pass
    return ballast


def settings_on(disk: Path, tmp_path: Path) -> ShelfSettings:
    return settings_in(disk, staging=tmp_path / "staging", staging_bytes=4_000_000)


def rows_files(disk: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in disk.rglob("*") if p.suffix in (".rows", ".end")}


@pytest.mark.parametrize("but_bytes", [0, 4096, 8192, 16384, 65536])
def test_a_nearly_full_disk_costs_nothing_at_start(
    small_disk: Path, tmp_path: Path, but_bytes: int
) -> None:
    settings = settings_on(small_disk, tmp_path)
    store = opened(settings)
    saved = save(store, TOKENS[:2000])
    store.close()
    before = rows_files(small_disk)
    ballast = fill(small_disk, but_bytes=but_bytes)

    async def life() -> str | None:
        opened_store = await Store.open(settings)
        hit = await opened_store.match(TOKENS[:2000], namespace="")
        if opened_store.report.unsaved is None:
            assert hit is not None
            assert hit.at_tokens == 2000, "what was saved is found on a full disk"
            ready = await opened_store.materialize(saved.extent_id, 2000)
            assert (settings.staging / ready.name).read_bytes() == slot_file(TOKENS[:2000])
        name = await opened_store.new_save(len(slot_file(TOKENS)))
        (settings.staging / name).write_bytes(slot_file(TOKENS))
        with allowing("no_space", "index"):
            await opened_store.absorb(
                name,
                namespace="",
                marks=[KeptMark(digest_of(TOKENS), len(TOKENS))],
                origin=Origin.CONVERSATION,
                prefill_s=1.0,
            )
        await opened_store.close()
        return opened_store.report.unsaved

    asyncio.run(life())
    assert rows_files(small_disk) == before
    ballast.unlink()
    store = opened(settings)
    assert store.shelf.report.lines() == []
    assert restored(store, saved.extent_id, 2000) == slot_file(TOKENS[:2000])


def test_a_first_start_on_a_full_disk_keeps_prefixes_for_its_life(
    small_disk: Path, tmp_path: Path
) -> None:
    ballast = fill(small_disk)
    settings = settings_on(small_disk, tmp_path)

    async def life() -> None:
        store = await Store.open(settings)
        assert "full" in (store.report.unsaved or "")
        assert "store prune" in store.report.lines()[0]
        name = await store.new_save(len(slot_file(TOKENS)))
        (settings.staging / name).write_bytes(slot_file(TOKENS))
        saved = await store.absorb(
            name,
            namespace="",
            marks=[KeptMark(digest_of(TOKENS), len(TOKENS))],
            origin=Origin.TIER,
            prefill_s=1.0,
        )
        ready = await store.materialize(saved.extent_id, 1000)
        assert (settings.staging / ready.name).read_bytes() == slot_file(TOKENS[:1000])
        await store.close()

    asyncio.run(life())
    assert list(settings.staging.iterdir()) == [], "and nothing of it stays in memory"
    assert ballast.exists()


def _half(store: ShelfSettings) -> int:
    return PLAIN.rows_bytes(1000)


@pytest.mark.parametrize("bound", [lambda _: 0, _half])
def test_pruning_helps_on_a_full_disk(
    small_disk: Path, tmp_path: Path, bound: Callable[[ShelfSettings], int]
) -> None:
    settings = settings_on(small_disk, tmp_path)
    store = opened(settings)
    for start in range(0, 4000, 1000):
        save(store, TOKENS[start : start + 1000], now_s=float(start))
    store.close()
    fill(small_disk)
    (pruned,) = prune_root(settings.root, bound(settings))
    kept = bound(settings) // PLAIN.rows_bytes(1000)
    assert pruned.why_not is None
    assert pruned.extents == 4 - kept
    assert pruned.size_bytes == (4 - kept) * PLAIN.rows_bytes(1000)
    assert len(rows_files(small_disk)) == kept
    store = opened(settings)
    assert store.shelf.report.lines() == []
    assert len(store.shelf.catalog.tree) == kept
    if not kept:
        save(store, TOKENS[:100])


def test_a_disk_that_fills_while_running_is_a_miss_and_can_be_pruned(
    small_disk: Path, tmp_path: Path
) -> None:
    settings = settings_on(small_disk, tmp_path)
    store = opened(settings)
    saved = save(store, TOKENS[:1000])
    fill(small_disk)
    with pytest.raises(SnapshotError) as caught:
        save(store, TOKENS)
    assert caught.value.reason in ("no_space", "index")
    assert restored(store, saved.extent_id, 900) == slot_file(TOKENS[:900])
    store.prune(0)
    assert rows_files(small_disk) == {}
    save(store, TOKENS[:100])
    store.close()


# What a gateway writes with SQLite, on a disk that is full: it is refused, or it fits.
_WRITER = """
import asyncio, sys
from pathlib import Path
from test_store_full_disk import fill, settings_on
from keepwarm.batch.ledger import Ledger
from keepwarm.errors import KeepwarmError, SnapshotError
from keepwarm.explain.history import History
from keepwarm.store.checks import list_extents, prune_root, stores
from storesamples import allowing, opened, save

disk, scratch = map(Path, sys.argv[1:])
for life in range(2):
    with allowing("no_space", "index", "io"):
        store = opened(settings_on(disk, scratch))
        save(store, list(range(500)))
        fill(disk)
        for start in range(0, 50_000, 500):
            with allowing("no_space"):
                save(store, list(range(start, start + 500)))
        for one in stores(disk / "store"):
            list_extents(disk / "store", one.name)
        store.close()
    try:
        ledger = Ledger(disk / "batches")
        ledger.close()
    except KeepwarmError as error:
        assert "damaged" not in str(error), error
    history = History(disk / "history.sqlite", keeps_text=False)
    history.close()
prune_root(disk / "store", 0)
print("lived")
"""


@pytest.fixture
def small_blocks(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB in blocks of 1 KiB, as small disks have them."""
    disk, image = tmp_path / "blocks", tmp_path / "image"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    for command in (
        ["mkfs.ext4", "-q", "-F", "-b", "1024", "-m", "0", str(image)],
        ["mount", "-o", "loop", str(image), str(disk)],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be made here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_of_small_blocks_ends_nobody(small_blocks: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(small_blocks), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    assert done.stdout == "lived\n"
