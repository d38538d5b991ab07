"""Rules about the machine: disks, memory, cores, and what lies in the store. Pure."""

from __future__ import annotations

from keepwarm.doctor.facts import DiskFacts, ServerFacts
from keepwarm.doctor.finding import Finding, Severity

_MEMORY = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs", "afs")
# Where a snapshot's size isn't known, as much as a few conversations take.
_LITTLE_BYTES = 256 << 20
# A restore that takes longer is felt; and the same for a write that nobody knows the size of.
_LONG_S = 1.0
_SLOW_BYTES_S = 50e6
# A few pages of a process are always swapped out on a machine with swap.
_SWAPPED_BYTES = 8 << 20


def slot_dir_full(facts: ServerFacts) -> Finding | None:
    """A save fails for want of space."""
    disk = facts.slot_dir
    if disk is None:
        return None
    need = facts.largest_tier_bytes
    limit = _LITTLE_BYTES if need is None else 2 * need
    if disk.free_bytes >= limit:
        return None
    is_too_little = need is not None and disk.free_bytes < need
    return Finding(
        "slot_dir_full",
        Severity.ERROR if is_too_little else Severity.WARNING,
        f"The slot directory {disk.path} has {_mb(disk.free_bytes)} left"
        + (f"; the largest tier alone takes {_mb(need)}." if need is not None else "."),
        "Free some, or have it elsewhere (store.staging_dir; --slot-save-path of a llama-server).",
    )


def slot_dir_slow(facts: ServerFacts) -> Finding | None:
    """Every save and restore waits for a slow disk, and with it every slot of the engine."""
    disk = facts.slot_dir
    if disk is None or disk.kind in _MEMORY:
        return None
    return _slow(
        "slot_dir_slow",
        disk,
        facts.largest_tier_bytes,
        "The engine answers nobody while it saves or restores. Have the slot directory in memory "
        "(/dev/shm) or on a local SSD.",
    )


def slot_dir_forgets(facts: ServerFacts) -> Finding | None:
    """A plain server's snapshots lie in memory and nowhere else."""
    disk = facts.slot_dir
    if facts.kind != "llama-server" or disk is None or disk.kind not in _MEMORY:
        return None
    is_kept = facts.store is not None and facts.store.pins > 0
    return Finding(
        "slot_dir_forgets",
        Severity.NOTE if is_kept else Severity.WARNING,
        f"The slot directory {disk.path} is in memory ({disk.kind}): what is saved there is gone "
        "with a reboot."
        + (
            f" What the store in {facts.store.disk.path} holds is not."
            if is_kept and facts.store
            else ""
        ),
        "" if is_kept else "Keep the tiers in a store on a disk: `keepwarm warmup --store DIR`.",
    )


def store_disk(facts: ServerFacts) -> Finding | None:
    """The store can't grow to what it is allowed."""
    store = facts.store
    if store is None:
        return None
    room = store.quota_bytes - store.used_bytes
    if room <= store.disk.free_bytes:
        return None
    return Finding(
        "store_disk",
        Severity.WARNING,
        f"The store in {store.disk.path} may grow by another {_mb(room)}, but its disk has only "
        f"{_mb(store.disk.free_bytes)} left.",
        f"Give it less (store.quota_bytes, now {store.quota_bytes}), or another disk (store.dir).",
    )


def store_slow(facts: ServerFacts) -> Finding | None:
    """What is kept lies on a slow disk."""
    store = facts.store
    if store is None or store.disk.kind in _MEMORY:
        return None
    return _slow(
        "store_slow",
        store.disk,
        facts.largest_tier_bytes,
        "Have the store on a local SSD (store.dir).",
    )


def store_forgets(facts: ServerFacts) -> Finding | None:
    """The store itself lies in memory."""
    if facts.store is None or facts.store.disk.kind not in _MEMORY:
        return None
    return Finding(
        "store_forgets",
        Severity.WARNING,
        f"The store {facts.store.disk.path} is in memory: after a reboot everything is cold.",
        "Have it on a disk (store.dir).",
    )


def foreign_snapshots(facts: ServerFacts) -> Finding | None:
    """Snapshots of another model, engine or template take space."""
    store = facts.store
    if store is None or not store.is_open or not store.idle_stores:
        return None
    return Finding(
        "foreign_snapshots",
        Severity.NOTE,
        f"{_mb(store.idle_bytes)} in the store belong to {store.idle_stores} other "
        f"fingerprint{'s' if store.idle_stores > 1 else ''} (another model, engine, template or KV "
        "type). They aren't used by what runs now, and are the first to go when room is needed.",
        "`keepwarm store prune` removes them now; keep them if you change back and forth.",
    )


def swapped(facts: ServerFacts) -> Finding | None:
    """Part of the engine must come back from swap."""
    size_bytes = facts.process.swapped_bytes
    if size_bytes is None or size_bytes < _SWAPPED_BYTES:
        return None
    return Finding(
        "swapped",
        Severity.WARNING,
        f"{_mb(size_bytes)} of the engine (process {facts.process.pid}) are in swap. A prefix that "
        "must come back from there isn't warm.",
        "Keep the service out of swap (MemorySwapMax=0, as Keepwarm's units do), or give the "
        "model, the context or the machine's other programs less memory.",
    )


def too_many_threads(facts: ServerFacts) -> Finding | None:
    """More threads than cores: all wait for the one that isn't running."""
    process = facts.process
    if facts.kind == "none" and process.threads is None:
        return None
    threads = process.threads or process.machine_cores
    if threads <= process.cores:
        return None
    said = "" if process.threads else ", as it does by default"
    return Finding(
        "too_many_threads",
        Severity.WARNING,
        f"The engine runs {threads} threads{said}, but may use {process.cores} "
        f"core{'s' if process.cores > 1 else ''}. They wait for each other at every layer, so too "
        "many are much slower than too few.",
        f"Give --threads {process.cores} or one less.",
    )


def busy_machine(facts: ServerFacts) -> Finding | None:
    """Other programs take the cores that the engine's threads need at the same time."""
    process = facts.process
    if process.load is None or process.load < 2 * process.machine_cores:
        return None
    return Finding(
        "busy_machine",
        Severity.WARNING,
        f"The machine is busy: a load of {process.load:.1f} on {process.machine_cores} cores. The "
        "engine's threads wait for the slowest of them, so it suffers more than other programs.",
        "Move other work away, or give the engine fewer threads than there are cores.",
    )


def _slow(code: str, disk: DiskFacts, need: float | None, advice: str) -> Finding | None:
    if disk.kind in _NETWORK:
        return Finding(
            code,
            Severity.WARNING,
            f"{disk.path} lies on a network file system ({disk.kind}).",
            advice,
        )
    if disk.write_bytes_s is None:
        return None
    too_long = need is not None and need / disk.write_bytes_s > _LONG_S
    if disk.write_bytes_s >= _SLOW_BYTES_S and not too_long:
        return None
    takes = f": the largest tier takes {need / disk.write_bytes_s:.1f} s" if need else ""
    return Finding(
        code,
        Severity.WARNING,
        f"{disk.path} takes {disk.write_bytes_s / 1e6:,.0f} MB a second{takes}.",
        advice,
    )


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.0f} MB"
