"""What keeping each token once gives: bytes on disk, and what a restore costs.

    python -m benchmarks.store_live --model m.gguf

*Bytes*: conversations of several turns over three tiers, saved after each turn with the model's
real bytes a token, against whole slot files of the same saves; and what one save of a new turn
writes, against the turn's own rows. *Restores*: a prefix of 2,000 tokens in the real engine, in
turns: from a ready whole file, from a node that isn't pinned (its file is assembled each time), and
from a pinned one. *Pages*: as many bytes written into new files of the staging directory and over
old ones. Writes one JSON object to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.progress import track

from benchmarks.store_scale import SMOLLM2, Workload, bytes_on_disk, settings_in
from keepwarm.bench.machine import describe_model, machine
from keepwarm.cli.output import err
from keepwarm.core.tree import Tokens
from keepwarm.deployment.probe import probe
from keepwarm.engine.attach import plan_launch
from keepwarm.engine.client import EngineClient
from keepwarm.engine.session import wait_ready
from keepwarm.settings import EngineSettings, StoreSettings
from keepwarm.store.disk import Disk
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.store import Store
from keepwarm.store.types import Mark, Origin

# The packaged tiers' sizes with SmolLM2's tokenizer, and a question with a short answer.
TIERS_TOKENS = (241, 2083, 3633)
TURN_TOKENS = 35
RESTORED_TOKENS = 2000


def conversations(work: Workload, *, count: int, turns: int) -> Iterator[tuple[str, Tokens]]:
    """Namespace and tokens of each save, turn by turn of all conversations over the tiers."""
    tiers = [work.tokens(TIERS_TOKENS[-1])[:size] for size in TIERS_TOKENS]
    for tier in tiers:
        yield "", tier
    so_far = [tiers[i % len(tiers)] for i in range(count)]
    for _ in range(turns):
        for i, tokens in enumerate(so_far):
            so_far[i] = np.concatenate([tokens, work.tokens(TURN_TOKENS)])
            yield "", so_far[i]


def measure_bytes(base: Path, staging: Path, *, count: int, turns: int) -> dict[str, Any]:
    """The store on disk against whole files, and the bytes that a new turn's save writes."""
    largest = TIERS_TOKENS[-1] + turns * TURN_TOKENS
    work = Workload(SMOLLM2, largest_bytes=SMOLLM2.rows_bytes(largest))
    settings = replace(settings_in(base, staging, SMOLLM2), quota_bytes=64 << 30)
    store = Snapshots(settings, disk=Disk(), now_s=time.time())
    whole_bytes, written = 0, []
    total = count * turns + len(TIERS_TOKENS)
    given = conversations(work, count=count, turns=turns)
    saves = track(given, "saving turns", total=total, console=err)
    for done, (name, tokens) in enumerate(saves):
        whole_bytes += SMOLLM2.rows_bytes(tokens.size)
        before = _written_bytes()
        work.save(store, name, tokens)
        if before is not None and done >= len(TIERS_TOKENS):
            written.append((_written_bytes() or 0) - before)
    store.close()
    kept_bytes = bytes_on_disk(settings.root)
    found: dict[str, Any] = {
        "conversations": count,
        "turns": turns,
        "whole_files_bytes": whole_bytes,
        "store_bytes": kept_bytes,
        "times_smaller": round(whole_bytes / kept_bytes, 1),
    }
    if written:
        own = SMOLLM2.rows_bytes(TURN_TOKENS)
        found["turn_rows_bytes"] = own
        found["written_over_rows"] = {
            "median": round(statistics.median(written) / own, 3),
            "max": round(max(written) / own, 3),
            "sum": round(sum(written) / own / len(written), 3),
        }
    return found


def _written_bytes() -> int | None:
    """What this process has sent to its disks, index and log included; only Linux tells.

    Staging is in memory and isn't counted, nor is what is written to it.
    """
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return None
    return int(text.partition("\nwrite_bytes:")[2].split()[0])


def measure_pages(staging: Path, *, rounds: int) -> dict[str, Any]:
    """Milliseconds to write a slot file's bytes into a new file, and over one that is there."""
    size = SMOLLM2.rows_bytes(RESTORED_TOKENS)
    payload = memoryview(os.urandom(size))
    seconds: dict[str, list[float]] = {"into a new file": [], "over an old file": []}
    old = staging / "old"
    old.write_bytes(payload)
    for _ in range(rounds):
        for way, path in (("into a new file", staging / "new"), ("over an old file", old)):
            begin = time.perf_counter()
            with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
                file.write(payload)
            seconds[way].append(time.perf_counter() - begin)
        (staging / "new").unlink()
    old.unlink()
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {"bytes": size, "median_ms": {w: round(1e3 * s, 1) for w, s in medians.items()}}


async def measure_restores(
    base: Path, staging: Path, *, settings: EngineSettings, rounds: int
) -> dict[str, Any]:
    """Milliseconds of the three ways to have the same prefix in a slot, and their ratios."""
    launch = await plan_launch(settings, slot_dir=staging)
    client, process = EngineClient(launch.base_url), launch.process()
    assert process
    try:
        err.print("loading the model", highlight=False)
        await process.start()
        await wait_ready(client, process, timeout_s=settings.start_timeout_s)
        kind = launch.model.memory if launch.model else None
        probed = await probe(client, staging, kind=kind, max_tokens=RESTORED_TOKENS + 64)
        if probed.layout is None:
            raise SystemExit(f"this model's slot files aren't taken apart: {probed.reason}")
        store = await Store.open(
            replace(
                settings_in(base, staging, probed.layout),
                streams=probed.streams,
                staging_bytes=StoreSettings().staging_bytes,
            )
        )
        return await _restored(client, store, rounds=rounds)
    finally:
        await process.stop()


async def _restored(client: EngineClient, store: Store, *, rounds: int) -> dict[str, Any]:
    text = "The quick brown fox jumps over the lazy dog and counts the sheep again. " * 200
    tokens = (await client.tokenize(text))[:RESTORED_TOKENS]
    err.print(f"prefilling {len(tokens):,} tokens", highlight=False)
    await client.fill(tokens, slot=0)
    name = await store.new_save(256 << 20)
    whole = "whole.slot"  # not one of the store's names, so it stays
    await client.save(0, whole)
    await client.save(0, name)
    end = Mark(b"w" * 16, len(tokens))
    saved = await store.absorb(
        name, namespace="", marks=[end], origin=Origin.TIER, prefill_s=1.0, expected_tokens=tokens
    )
    assert saved.extent_id is not None
    await store.pin("whole", saved.extent_id, len(tokens), origin=Origin.TIER)

    async def node(at: int) -> None:
        ready = await store.materialize(saved.extent_id, at)
        try:
            await client.restore(1, ready.name)
        finally:
            store.release(ready.name)

    seconds: dict[str, list[float]] = {"ready whole file": [], "unpinned": [], "pinned": []}
    for i in track(range(-2, rounds), "restoring", console=err):
        ways = {
            "ready whole file": client.restore(1, whole),
            # Another token each time, so that no file that was assembled before fits.
            "unpinned": node(len(tokens) - 3 - i),
            "pinned": node(len(tokens)),
        }
        for way, work in ways.items():
            begin = time.perf_counter()
            await work
            if i >= 0:
                seconds[way].append(time.perf_counter() - begin)
    await store.close()
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    base = medians["ready whole file"]
    return {
        "tokens": len(tokens),
        "rounds": rounds,
        "median_ms": {way: round(1e3 * value, 2) for way, value in medians.items()},
        "over_ready_whole_file": {way: round(value / base, 2) for way, value in medians.items()},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=None, help="on the disk to be measured")
    args = parser.parse_args()
    engine = EngineSettings(model=args.model, slots=2, context=8192, threads=args.threads)
    memory = Path("/dev/shm")  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-live-", dir=args.dir) as directory,
        tempfile.TemporaryDirectory(
            prefix="keepwarm-live-", dir=memory if memory.is_dir() else args.dir
        ) as staging,
    ):
        base, passing = Path(directory), Path(staging)
        (passing / "engine").mkdir()
        found = {
            "load_average": os.getloadavg(),
            "bytes": measure_bytes(
                base / "bytes", passing, count=args.conversations, turns=args.turns
            ),
            "pages": measure_pages(passing, rounds=args.rounds),
            "restores": asyncio.run(
                measure_restores(
                    base / "live", passing / "engine", settings=engine, rounds=args.rounds
                )
            ),
            "machine": msgspec.to_builtins(machine()),
            "model": describe_model(Path(args.model)),
        }
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
