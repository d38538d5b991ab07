"""What goes in and out of the store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from keepwarm.core.tree import Tokens


class Origin(StrEnum):
    """Why something was saved; kept with it, so that what fills the disk can be explained."""

    TIER = "tier"
    """A tier's static prompt, warmed at start."""
    LEARNED = "learned"
    """A prefix that clients were seen to repeat."""
    CONVERSATION = "conversation"
    """A turn, saved because its slot was needed for something else, or before shutdown."""
    FILL = "fill"
    """A common part of a batch, filled ahead of it."""
    IMPORT = "import"
    """It came in a file."""


class KeptMark(NamedTuple):
    """A request's canonical prefix and how many tokens of it are kept.

    `digest` is 16 bytes from the hash chain. `is_exact` False: the prefix has at least `at_tokens`
    tokens, and these are its first.
    """

    digest: bytes
    at_tokens: int
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest kept prefix that a look-up found.

    `index` says which of the digests asked for (-1 for a match by tokens). `at_tokens` is where a
    restore would end; `is_exact` that it is the very end of that digest's prefix. `restore_bytes`
    is the size of the slot file, and `is_ready` that it waits in the staging directory.
    """

    index: int
    extent_id: int
    at_tokens: int
    is_exact: bool
    restore_bytes: int
    is_ready: bool


@dataclass(frozen=True, slots=True)
class Saved:
    """What `absorb` kept: the prefix of `at_tokens` tokens that ends in `extent_id`.

    `new_tokens` of them weren't known before. `new_bytes` were written for these and the boundary
    state; 0 when all of it was there. `ends` are those whose state the file held, kept or not.
    """

    extent_id: int
    at_tokens: int
    new_tokens: int
    new_bytes: int
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """A slot file in the staging directory that `restore` can read, held until `release(name)`."""

    name: str
    extent_id: int
    at_tokens: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pin:
    """A named prefix that is never evicted: `tier:standard`, `learned:<key>:<digest>`, and
    `~` and its name behind that for a coding agent's.

    `digest` is that of its mark, if there is one. `prefill_s` is what a cold prefill of it costs.
    `used_s` is None until its first use.
    """

    name: str
    extent_id: int
    at_tokens: int
    origin: Origin
    digest: bytes | None
    prefill_s: float
    created_s: float
    used_s: float | None
    uses: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What an eviction or a quarantine took away. `pins` lost their prefix and can be rebuilt."""

    extents: tuple[int, ...] = ()
    pins: tuple[str, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was removed of an API key. `marks` beside those of its extents; `refuse_bytes` is what
    the quarantine and files without an owner took, whoever's they were.
    """

    extents: int = 0
    pins: tuple[str, ...] = ()
    marks: int = 0
    size_bytes: int = 0
    refuse_bytes: int = 0


def tenant_of(pin: str) -> str | None:
    """Whose a pin is, by its name (`learned:<key>:...`, `hand:<key>:...`); None for a shared one.

    A key's name may hold colons itself.
    """
    kind, _, rest = pin.partition(":")
    return rest.rpartition(":")[0] or None if kind in ("learned", "hand") else None


@dataclass(frozen=True, slots=True)
class OpenReport:
    """What opening the store found. All zero and None after a clean life.

    Nothing is removed by opening. Strays are files of ours that the index doesn't name; dropped is
    what isn't used, because a file of it is missing or a row makes no sense. `set_aside` is why an
    unusable index was moved, and where; `unsaved` why nothing can be kept on the disk in this life.
    """

    extents: int = 0
    stray_files: int = 0
    stray_bytes: int = 0
    missing_files: int = 0
    bad_rows: int = 0
    dropped_extents: int = 0
    dropped_pins: tuple[str, ...] = ()
    staging_leftovers: int = 0
    set_aside: str | None = None
    unsaved: str | None = None

    def lines(self) -> list[str]:
        """For people; empty when there is nothing to say."""
        said = []
        if self.unsaved:
            said.append(
                f"nothing is saved in this life: {self.unsaved}. `keepwarm store prune --quota "
                "BYTES` frees space, `store.dir` names another place; then restart"
            )
        if self.set_aside:
            said.append(f"began a new snapshot index: {self.set_aside}")
        if self.stray_files:
            said.append(
                f"{self.stray_files} files ({self.stray_bytes:,} bytes) that the index doesn't "
                "name are left as they are until room is needed (`keepwarm store prune` removes "
                "them)"
            )
        if self.bad_rows:
            said.append(f"{self.bad_rows} rows of the index make no sense and aren't used")
        if self.missing_files or self.dropped_extents:
            said.append(
                f"{self.missing_files} snapshot files are missing: "
                f"{self.dropped_extents} extents that need them aren't used"
            )
        if self.dropped_pins:
            said.append(f"to be warmed again: {', '.join(self.dropped_pins)}")
        return said


@dataclass(frozen=True, slots=True)
class StoreFinding:
    """One thing that is wrong: `what` (bounded words) and the file or extent it is about."""

    what: str
    about: str


@dataclass(frozen=True, slots=True)
class Verified:
    """The outcome of reading everything again."""

    extents: int
    read_bytes: int
    findings: tuple[StoreFinding, ...]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Sizes and counts since the store was opened; `*_bytes` in bytes on the disk.

    `used_bytes` is extents, boundary states and quarantine of this fingerprint, `other_bytes` what
    other fingerprints hold under the same root; both count against `quota_bytes`.
    """

    extents: int
    boundaries: int
    pins: int
    marks: int
    kept_tokens: int
    used_bytes: int
    other_bytes: int
    quarantined_bytes: int
    quota_bytes: int
    staging_bytes: int
    ready_files: int
    saves: int
    written_bytes: int
    materialized: int
    ready_hits: int
    evicted_extents: int
    evicted_bytes: int
    quarantined_extents: int
    quarantined_ends: int
    damaged_staged: int


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of `keepwarm store ls`. `pins` are those that end in this extent."""

    extent_id: int
    parent: int | None
    lo: int
    hi: int
    namespace: str
    origin: Origin
    size_bytes: int
    boundaries: tuple[int, ...]
    pins: tuple[str, ...]
    prefill_s: float
    created_s: float
    used_s: float
    uses: int


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import_` took from a file."""

    saved: Saved
    pin: str | None
    tokens: Tokens
