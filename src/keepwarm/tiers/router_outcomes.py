"""What became of routed requests, kept privately on this machine and without any text.

One SQLite file (0600, in a 0700 directory). `record` only appends to memory, so it may be called on
the event loop; `flush` writes and belongs on a worker thread. The oldest rows beyond `KEPT` go.
Losing the last unflushed rows in a crash loses nothing but a little evidence, so no fsync is waited
for.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from keepwarm.errors import ConfigError
from keepwarm.router.calibrate import Outcome
from keepwarm.router.escalation import Cause

OUTCOMES_FILE: Final = "router-outcomes.sqlite3"
#: Rows kept: at a request a minute, a month; about 8 MB.
KEPT: Final = 50_000
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outcomes (
    id INTEGER PRIMARY KEY,
    at_s REAL NOT NULL,
    tier TEXT NOT NULL,
    reason TEXT NOT NULL,
    logits TEXT NOT NULL,
    is_explicit INTEGER NOT NULL,
    escalated TEXT,
    tools_used INTEGER
)
"""


class OutcomeLog:
    """The outcomes of one deployment. Safe to use from several threads."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / OUTCOMES_FILE
        self._waiting: list[Outcome] = []
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Outcomes recorded and not yet written."""
        return len(self._waiting)

    def record(self, outcome: Outcome) -> None:
        """Remember one outcome; nothing touches the disk until `flush`."""
        self._waiting.append(outcome)

    def flush(self) -> None:
        """Write what is waiting.

        Raises:
            ConfigError: the file can't be written; what was waiting still is.
        """
        with self._lock:
            rows = self._waiting[:]
            if not rows:
                return
            with self._opened() as database:
                database.executemany(
                    "INSERT INTO outcomes (at_s, tier, reason, logits, is_explicit, escalated,"
                    " tools_used) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [_row(each) for each in rows],
                )
                database.execute(
                    "DELETE FROM outcomes WHERE id <= (SELECT max(id) FROM outcomes) - ?", (KEPT,)
                )
            del self._waiting[: len(rows)]

    def read(self, *, since_s: float = 0.0) -> list[Outcome]:
        """Written outcomes from a time on (seconds of the epoch), oldest first.

        Raises:
            ConfigError: the file can't be read.
        """
        if not self.path.exists():
            return []
        with self._lock, self._opened() as database:
            return [
                _outcome(row)
                for row in database.execute(
                    "SELECT at_s, tier, reason, logits, is_explicit, escalated, tools_used"
                    " FROM outcomes WHERE at_s >= ? ORDER BY id",
                    (since_s,),
                )
            ]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made before SQLite opens it, since SQLite would make it readable to all.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(self.path, timeout=10.0)) as database, database:
                database.execute("PRAGMA synchronous = OFF")
                database.execute(_SCHEMA)
                yield database
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{self.path} can't be used ({error}). Remove it to start again;"
                " only evidence for `keepwarm route calibrate` is lost."
            ) from error


def _row(outcome: Outcome) -> tuple[Any, ...]:
    logits: Mapping[str, float] = {k: round(v, 4) for k, v in outcome.logits.items()}
    return (
        outcome.at_s,
        outcome.tier,
        outcome.reason,
        json.dumps(logits),
        int(outcome.is_explicit),
        outcome.escalated,
        None if outcome.tools_used is None else int(outcome.tools_used),
    )


def _outcome(row: tuple[Any, ...]) -> Outcome:
    at_s, tier, reason, logits, explicit, escalated, tools_used = row
    return Outcome(
        at_s=at_s,
        tier=tier,
        reason=reason,
        logits=json.loads(logits),
        is_explicit=bool(explicit),
        escalated=Cause(escalated) if escalated in set(Cause) else None,
        tools_used=None if tools_used is None else bool(tools_used),
    )
