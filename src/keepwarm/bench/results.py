"""What a run measured, as it is written to JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

FORMAT = 1


class Sample(Struct, frozen=True, kw_only=True):
    """One streamed request as its client saw it.

    `ttft_s` runs from the request's first byte to the first content of the reply; `total_s` to its
    end. Tokens are the server's own counts. `plan` is Keepwarm's word for it, '' elsewhere.
    """

    scenario: str
    step: str
    arm: str
    run: int
    ttft_s: float
    total_s: float
    cached_tokens: int
    prefilled_tokens: int
    decoded_tokens: int
    plan: str = ""


class Duration(Struct, frozen=True, kw_only=True):
    """Something else than a request that took time: a start, a restart, a whole scenario."""

    scenario: str
    step: str
    arm: str
    run: int
    seconds: float


class Amount(Struct, frozen=True, kw_only=True):
    """Something that isn't a time: tokens a second, megabytes of memory."""

    scenario: str
    step: str
    arm: str
    run: int
    value: float
    unit: str


class Figure(Struct, frozen=True, kw_only=True):
    """One number that the run comes to, beside what it should be.

    `goal` is in words and '' where there is none; `met` is None then.
    """

    what: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None
    detail: str = ""


class Prefix(Struct, frozen=True, kw_only=True):
    """One warm tier: its tokens, and what Keepwarm did at its first start."""

    tier: str
    tokens: int
    size_bytes: int
    how: str
    seconds: float


class MachineRecord(Struct, frozen=True, kw_only=True):
    """Where it ran."""

    system: str
    processor: str
    cores: int
    python: str
    load: float


class BenchReport(Struct, frozen=True, kw_only=True):
    """A whole run. `settings` are words for people; times are local with their offset."""

    format: int = FORMAT
    kind: str
    keepwarm: str
    began: str
    seconds: float
    machine: MachineRecord
    engine: str
    model: str
    settings: dict[str, str]
    prefixes: Sequence[Prefix] = ()
    samples: Sequence[Sample] = ()
    durations: Sequence[Duration] = ()
    amounts: Sequence[Amount] = ()
    figures: Sequence[Figure] = ()
    store_bytes: int = 0
    notes: Sequence[str] = ()


def select(
    samples: Iterable[Sample],
    *,
    scenario: str | None = None,
    step: str | None = None,
    arm: str | None = None,
) -> list[Sample]:
    """The samples of one scenario, step and arm; None takes all."""
    return [
        s
        for s in samples
        if scenario in (None, s.scenario) and step in (None, s.step) and arm in (None, s.arm)
    ]


def ttfts(samples: Iterable[Sample]) -> list[float]:
    """Their times to first token, in seconds."""
    return [s.ttft_s for s in samples]


def write_json(report: BenchReport, path: Path) -> None:
    """Write a report, readable by people too."""
    raw = msgspec.json.format(msgspec.json.encode(report), indent=2)
    path.write_bytes(raw + b"\n")


def read_json(path: Path) -> BenchReport:
    """Read a report back.

    Raises:
        OSError: it can't be read.
        msgspec.DecodeError: it isn't one.
    """
    return msgspec.json.decode(path.read_bytes(), type=BenchReport)
