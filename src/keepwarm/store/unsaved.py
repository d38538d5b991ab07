"""A store for one life only, in the staging directory, when the gateway's own can't be used.

A full or read-only disk, an index of a newer version or one that somebody holds: none of it ends a
start. Prefixes are then warm as long as the gateway runs, and the report says why nothing is saved
and what to do. Nothing of the store that can't be used is touched.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from keepwarm.errors import SnapshotError
from keepwarm.store.disk import Disk, disk_errors
from keepwarm.store.places import UNSAVED
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.snapshots import Snapshots

log = logging.getLogger("keepwarm.store")


class Unsaved(Snapshots):
    """See the module. `why` is for people."""

    def __init__(self, settings: ShelfSettings, *, why: str, disk: Disk, now_s: float) -> None:
        """Begin it. Raises: SnapshotError if the staging directory can't be used, either."""
        with disk_errors("beginning a store in the staging directory"):
            settings.staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._root = Path(tempfile.mkdtemp(prefix=UNSAVED, dir=settings.staging))
        bound = min(settings.quota_bytes, settings.staging_bytes)
        try:
            super().__init__(
                replace(settings, root=self._root, quota_bytes=bound), disk=disk, now_s=now_s
            )
        except BaseException:
            self._remove()
            raise
        self.shelf.report = replace(self.shelf.report, unsaved=why)
        log.warning("%s", self.shelf.report.lines()[0])

    def close(self) -> None:
        """As `Snapshots.close`; nothing stays."""
        try:
            super().close()
        finally:
            self._remove()

    def _remove(self) -> None:
        # All of it was made by this process, under a name that was new.
        shutil.rmtree(self._root, ignore_errors=True)


def open_or_do_without(
    settings: ShelfSettings, *, disk: Disk, now_s: float, must_last: bool
) -> Snapshots:
    """The store, or one for this life if it can't be used now and needn't last.

    Raises: ConfigError if another process has it or its root can be no directory; SnapshotError.
    """
    try:
        return Snapshots(settings, disk=disk, now_s=now_s)
    except SnapshotError as error:
        if must_last:
            raise
        return Unsaved(settings, why=str(error), disk=disk, now_s=now_s)
