"""One thing that was found, how bad it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Severity(IntEnum):
    """How much it matters; a report's exit status follows from the worst."""

    UNKNOWN = 0
    """It couldn't be seen from here."""
    NOTE = 1
    """Good to know; nothing to do."""
    WARNING = 2
    """It costs warmth."""
    ERROR = 3
    """Requests are cold, or wrong, or not served at all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong (`what`), in a sentence or two, and what to do about it (`advice`).

    `code` is a stable name for programs.
    """

    code: str
    severity: Severity
    what: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "code": self.code,
            "severity": self.severity.name.lower(),
            "what": self.what,
            "advice": self.advice,
        }


def exit_status(findings: list[Finding]) -> int:
    """0 without warnings, 1 with warnings, 2 with errors."""
    worst = max((finding.severity for finding in findings), default=Severity.NOTE)
    return {Severity.WARNING: 1, Severity.ERROR: 2}.get(worst, 0)
