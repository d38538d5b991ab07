"""Other stores under the same root: what they take, and what of them may go.

Theory of operation. A quota is for a whole root. Stores that no process has open are mostly what an
upgrade left behind; when room is needed they go first, what was set aside before the others, then
the longest unused. A store that another process has open is never touched. It says in its lock what
it takes, and all that are open share the quota evenly: each keeps within its share once it needs
room. So none can fill the root for good, and none evicts its own for a save that can't fit anyway.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.lock import OwnerLock, told_by
from keepwarm.store.places import LOCK_SUFFIX, UNSAVED, own_files, remove_store, stores_in

log = logging.getLogger("keepwarm.store")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another store. `owner` None: no process has it open."""

    directory: Path
    size_bytes: int
    used_s: float
    owner: str | None

    @property
    def is_aside(self) -> bool:
        """Whether it was set aside as unusable."""
        return self.directory.suffix == ".aside"


class Neighbours:
    """See the module. Lives on the store's thread."""

    def __init__(self, own: Path, *, quota_bytes: int, disk: Disk) -> None:
        self._own = own
        self._quota_bytes = quota_bytes
        self._disk = disk
        self._measured: dict[tuple[str, int], int] = {}
        self.size_bytes = 0  # when last looked at

    def look(self) -> list[Neighbour]:
        """All of them, as they are now. Raises: SnapshotError."""
        with disk_errors("measuring other stores"):
            others = [one for one in stores_in(self._own.parent) if one != self._own]
            found = [self._measure(directory) for directory in others]
        self.size_bytes = sum(one.size_bytes for one in found)
        return found

    def _measure(self, directory: Path) -> Neighbour:
        lock = lock_of(directory)
        told = told_by(lock) if not directory.name.endswith(".aside") else None
        if told is not None and told.used_bytes is not None:
            return Neighbour(directory, told.used_bytes, time.time(), told.owner)
        try:
            used_ns = lock.stat().st_mtime_ns
        except FileNotFoundError:
            used_ns = directory.stat().st_mtime_ns
        # What nobody has open doesn't change, so it is counted once.
        key = (directory.name, used_ns)
        if told is not None or key not in self._measured:
            self._measured[key] = sum(file.size_bytes for file in own_files(directory))
        return Neighbour(directory, self._measured[key], used_ns / 1e9, told and told.owner)

    def share(self, neighbours: list[Neighbour]) -> int:
        """What this store may take at most, in bytes, beside those that are open."""
        open_bytes = [one.size_bytes for one in neighbours if one.owner is not None]
        return min(self._quota_bytes - sum(open_bytes), self._quota_bytes // (1 + len(open_bytes)))

    def clear(self, neighbours: list[Neighbour], *, bound_bytes: int) -> int:
        """Remove stores that nobody has open until all others are within the bound, or none is
        left that may go. Returns what the others take then.
        """
        total = sum(one.size_bytes for one in neighbours)
        for one in sorted(neighbours, key=lambda one: (not one.is_aside, one.used_s)):
            if total <= max(bound_bytes, 0):
                break
            if one.owner is None:
                total -= remove_unowned(one.directory, disk=self._disk)
        self.size_bytes = total
        return total


def lock_of(directory: Path) -> Path:
    """The lock that belongs to a store's directory, also to one that was set aside."""
    return directory.with_name(directory.name.partition(".")[0] + LOCK_SUFFIX)


def hold(directory: Path, *, what: str) -> OwnerLock | None:
    """Own a store that nobody has open, so that no other removes it for room of its own.

    None if that can't be: it is open elsewhere, or gone. Who opens it releases this first.
    """
    try:
        lock = OwnerLock(lock_of(directory), what=what)
        lock.tell(sum(file.size_bytes for file in own_files(directory)))
    except (ConfigError, OSError) as error:
        log.warning("the store %s can't be held: %s", directory, error)
        return None
    return lock


def remove_unowned(directory: Path, *, disk: Disk) -> int:
    """Remove a store unless a process has it open; returns the bytes freed, and says what went."""
    freed = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(ConfigError))
        if not directory.name.endswith(".aside"):  # what is aside belongs to nobody any more
            what = f"clearing away, process {os.getpid()}"
            stack.enter_context(OwnerLock(lock_of(directory), what=what))
        try:
            with disk_errors(f"removing {directory.name}"):
                freed = remove_store(directory, disk=disk)
        except (SnapshotError, ValueError) as error:
            log.warning("%s couldn't be removed: %s", directory, error)
        else:
            log.warning(
                "removed the store %s, which no gateway has open, to keep the quota: %d bytes",
                directory,
                freed,
            )
    return freed


def remove_left(staging: Path, *, disk: Disk) -> None:
    """Remove stores for one life (see `unsaved`) whose process has ended without removing them.

    Raises: OSError, SnapshotError.
    """
    for root in staging.glob(f"{UNSAVED}*"):
        for directory in stores_in(root):
            remove_unowned(directory, disk=disk)
            if not directory.exists():
                disk.unlink(lock_of(directory))
        with contextlib.suppress(OSError):  # something else is in it, or a living process's store
            root.rmdir()
