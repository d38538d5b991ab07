"""When batches may run: windows of the local day, `22:00-07:00, 12:30-13:15`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keepwarm.errors import ConfigError

_WINDOW = re.compile(r"^\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*$")
_DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class Hours:
    """Half-open windows [from, to) in minutes of the day; one may run over midnight.

    None at all means always.
    """

    windows: tuple[tuple[int, int], ...] = ()

    def is_open(self, minute: float) -> bool:
        """Whether a minute of the day (0 to 1440) is inside a window."""
        return not self.windows or any(
            lo <= minute < hi if lo < hi else minute >= lo or minute < hi for lo, hi in self.windows
        )

    def opens_in_min(self, minute: float) -> float:
        """Minutes until the next window; 0 inside one."""
        if self.is_open(minute):
            return 0.0
        return min((lo - minute) % _DAY_MIN for lo, _ in self.windows)


def parse_hours(text: str) -> Hours:
    """Read windows; an empty text means always.

    Raises:
        ConfigError: it isn't a list of `HH:MM-HH:MM`.
    """
    windows = []
    for part in text.split(",") if text.strip() else []:
        match = _WINDOW.match(part)
        if match is None:
            raise ConfigError(
                f"Hours are given like 22:00-07:00, several separated by commas, not {part!r}."
            )
        numbers = [int(n) for n in match.groups()]
        lo, hi = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if numbers[1] > 59 or numbers[3] > 59 or lo >= _DAY_MIN or hi > _DAY_MIN or lo == hi:
            raise ConfigError(f"{part.strip()!r} isn't a part of a day.")
        windows.append((lo, hi))
    return Hours(tuple(windows))
