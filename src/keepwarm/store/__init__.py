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
from keepwarm.store.shelf import StoreSettings
from keepwarm.store.store import Store
from keepwarm.store.types import (
    Finding,
    Hit,
    Imported,
    Listed,
    Mark,
    OpenReport,
    Origin,
    Pin,
    Ready,
    Removed,
    Saved,
    StoreStats,
    Verified,
)

__all__ = [
    "Finding",
    "Hit",
    "Imported",
    "Listed",
    "Mark",
    "OpenReport",
    "Origin",
    "Pin",
    "Pruned",
    "Ready",
    "Removed",
    "Saved",
    "Store",
    "StoreListed",
    "StoreSettings",
    "StoreStats",
    "Verified",
    "list_extents",
    "list_pins",
    "prune_root",
    "stores",
    "verify_files",
]
