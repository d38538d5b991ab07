"""A directory that task files are dropped into, and where each goes from there.

    DIR/night.jsonl                            dropped
    DIR/running/night-20260131-220000/         the file, its results, errors and journal
    DIR/done/night-20260131-220000/            all of it, with the report, when its tasks have ended
    DIR/failed/night-20260131-220000/          a file that can't be run at all

Each step is one rename, so whatever ends the watch, the next one finds every file in exactly one
place and goes on with what was running.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from keepwarm.batch.job import Paths
from keepwarm.errors import ConfigError

# A file that was just written may not be whole yet.
_SETTLED_S = 1.0
# How the names that we give to directories end; see `WatchedDirectory._new_home`.
_HOME = re.compile(r"-\d{8}-\d{6}(-\d+)?$")


class WatchedDirectory:
    """See the module. For one watch at a time; a journal that is in use says so."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running = directory / "running"
        self._done = directory / "done"
        self._failed = directory / "failed"

    def prepare(self) -> None:
        """Make the directories.

        Raises:
            ConfigError: it can't be done.
        """
        if not self._directory.is_dir():
            raise ConfigError(f"There is no directory {self._directory}.")
        try:
            for path in (self._running, self._done, self._failed):
                path.mkdir(mode=0o700, exist_ok=True)
            for path in self._running.iterdir():
                if _HOME.search(path.name) and path.is_dir() and not any(path.iterdir()):
                    path.rmdir()  # of ours: the file had not been moved into it yet
        except OSError as error:
            raise ConfigError(f"{error.filename} can't be used: {error.strerror}.") from error

    def is_empty(self) -> bool:
        """Whether nothing runs and nothing was dropped, whole or not yet."""
        return not self._files() and not any(self._running.iterdir())

    def next(self) -> Paths | None:
        """What was running, else the whole file that has waited longest, taken in."""
        for home in sorted(self._running.iterdir()):
            for tasks in sorted(home.glob("*.jsonl")):
                if not tasks.name.startswith("results."):
                    return _paths(tasks)
        settled = [f for f in self._files() if time.time() - f.stat().st_mtime >= _SETTLED_S]
        if not settled:
            return None
        tasks = min(settled, key=lambda f: (f.stat().st_mtime, f.name))
        home = self._new_home(tasks.stem)
        return _paths(tasks.rename(home / _kept_name(tasks.name)))

    def done(self, paths: Paths) -> None:
        """All tasks of a file have ended: put it away, with what came of it."""
        for suffix in ("", "-wal"):
            paths.journal.with_name(paths.journal.name + suffix).unlink(missing_ok=True)
        paths.tasks.parent.rename(self._done / paths.tasks.parent.name)

    def failed(self, paths: Paths) -> None:
        """A file that can't be run: put it aside."""
        paths.tasks.parent.rename(self._failed / paths.tasks.parent.name)

    def _files(self) -> list[Path]:
        return [
            Path(entry.path)
            for entry in os.scandir(self._directory)
            if entry.is_file() and entry.name.endswith(".jsonl") and not entry.name.startswith(".")
        ]

    def _new_home(self, stem: str) -> Path:
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while True:
            unique = name if number == 1 else f"{name}-{number}"
            taken = [home / unique for home in (self._running, self._done, self._failed)]
            if not any(path.exists() for path in taken):
                taken[0].mkdir(mode=0o700)
                return taken[0]
            number += 1


def _kept_name(name: str) -> str:
    """Tasks aren't called like their results."""
    return f"tasks-{name}" if name.startswith("results.") else name


def _paths(tasks: Path) -> Paths:
    return Paths.beside(tasks, tasks.with_name("results.jsonl"))
