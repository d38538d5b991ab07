"""What the rules judge: everything that was seen of a deployment. None means not seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from keepwarm.core.memory import MemoryKind
from keepwarm.core.volatile import Volatile
from keepwarm.doctor.flags import ServerFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFacts:
    """One tier, as the running model renders it.

    `tokens` None: it couldn't be rendered, `failure` says why. `volatile` are places in its own
    files, each with the file's name.
    """

    name: str
    tokens: int | None = None
    missing_tools: tuple[str, ...] = ()
    volatile: tuple[tuple[str, Volatile], ...] = ()
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """A directory and the file system that it lies on.

    `kind` as the kernel names it (ext4, tmpfs, nfs4). `write_bytes_s` was measured by a small file
    that was written through to the disk.
    """

    path: str
    kind: str
    free_bytes: int
    write_bytes_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """The store of snapshots. `idle_bytes` belong to fingerprints that no running Keepwarm has."""

    disk: DiskFacts
    used_bytes: int
    quota_bytes: int
    pins: int = 0
    is_open: bool = False
    idle_stores: int = 0
    idle_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFacts:
    """The engine's process, where it runs on this machine. `cores` are those that it may use.

    `threads` None: not said, which means one for each core of the machine.
    """

    pid: int | None = None
    swapped_bytes: int | None = None
    threads: int | None = None
    cores: int = 1
    machine_cores: int = 1
    load: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """See the module.

    `kind` is what answers at `url`; `none` where nothing does, for `failure`'s reason.
    `flags` None: the command line can't be seen. `keeps_idle` is what a small experiment found: a
    slot still holds its tokens after another one has worked; None for `untried`'s reason.
    `build` is what the engine calls itself.
    `rendered` is a short conversation through the model's template. `agents` are the coding agents
    whose prompts were learned, as they call themselves; `hygiene` names the rules that are on.
    """

    url: str
    kind: Literal["keepwarm", "llama-server", "none"]
    today: date
    failure: str = ""
    build: str = ""
    state: str = ""
    status: str = ""
    slots: int | None = None
    slot_tokens: int | None = None
    template: str | None = None
    rendered: str | None = None
    flags: ServerFlags | None = None
    keeps_idle: bool | None = None
    untried: str = ""
    can_save: bool | None = None
    memory: MemoryKind | None = None
    window_tokens: int = 0
    bytes_a_token: float | None = None
    tiers: tuple[TierFacts, ...] = ()
    tiers_failure: str = ""
    slot_dir: DiskFacts | None = None
    store: StoreFacts | None = None
    process: ProcessFacts = field(default_factory=ProcessFacts)
    agents: tuple[str, ...] = ()
    hygiene: tuple[str, ...] = ()

    @property
    def largest_tier(self) -> TierFacts | None:
        """The tier with the most tokens, None if none could be counted."""
        counted = [tier for tier in self.tiers if tier.tokens]
        return max(counted, key=lambda tier: tier.tokens or 0, default=None)

    @property
    def largest_tier_bytes(self) -> float | None:
        """Bytes of the largest tier's snapshot."""
        tier = self.largest_tier
        if tier is None or tier.tokens is None or self.bytes_a_token is None:
            return None
        return tier.tokens * self.bytes_a_token
