"""What is kept on disk. `Store` is its face; docs/snapshot-store.md tells formats and sizes."""

from keepwarm.store.checks import (
    Pruned,
    StoreListed,
    list_extents,
    list_pins,
    prune_root,
    stores,
    verify_files,
)
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.store import Store
from keepwarm.store.types import (
    Hit,
    Imported,
    KeptMark,
    Listed,
    OpenReport,
    Origin,
    Pin,
    Ready,
    Removed,
    Saved,
    StoreFinding,
    StoreStats,
    Verified,
)

__all__ = [
    "Hit",
    "Imported",
    "KeptMark",
    "Listed",
    "OpenReport",
    "Origin",
    "Pin",
    "Pruned",
    "Ready",
    "Removed",
    "Saved",
    "ShelfSettings",
    "Store",
    "StoreFinding",
    "StoreListed",
    "StoreStats",
    "Verified",
    "list_extents",
    "list_pins",
    "prune_root",
    "stores",
    "verify_files",
]
