"""What a person does to a running store: look at it, evict or forget something now.

On the store's thread.
"""

from __future__ import annotations

from dataclasses import replace

from keepwarm.errors import SnapshotError
from keepwarm.store.shelf import Shelf
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Forgotten, Listed, Origin, Removed, tenant_of


def list_extents(snapshots: Snapshots) -> list[Listed]:
    """All extents, parents before children, with their uses up to this moment."""
    catalog = snapshots.shelf.catalog
    pins: dict[int, list[str]] = {}
    for name, pin in sorted(catalog.pins.items()):
        pins.setdefault(pin.extent_id, []).append(name)
    found = []
    for extent in sorted(catalog.tree, key=lambda extent: extent.id):
        row, uses = catalog.row(extent.id), catalog.uses(extent.id)
        found.append(
            Listed(
                extent_id=extent.id,
                parent=extent.parent,
                lo=extent.lo,
                hi=extent.hi,
                namespace=extent.namespace,
                origin=Origin(row.origin),
                size_bytes=extent.total_bytes,
                boundaries=tuple(sorted(extent.boundaries)),
                pins=tuple(pins.get(extent.id, ())),
                prefill_s=row.prefill_s,
                created_s=row.created_s,
                used_s=uses.used_s,
                uses=uses.count,
            )
        )
    return found


def last_end(snapshots: Snapshots, extent_id: int) -> int:
    """Up to where an extent's prefix can be restored at most, in tokens.

    Raises: SnapshotError('unknown') if it isn't there, 'boundary' if nothing of it can be restored.
    """
    catalog = snapshots.shelf.catalog
    extent = catalog.tree.get(extent_id)
    if extent is None:
        raise SnapshotError(f"there is no extent {extent_id}", reason="unknown")
    end = catalog.restorable(extent_id, extent.hi)
    if end.extent_id != extent_id:
        raise SnapshotError(f"extent {extent_id} can't be restored by itself", reason="boundary")
    return end.at


def evict_extent(snapshots: Snapshots, extent_id: int) -> Removed:
    """Evict an extent and all that hangs off it, whatever it is worth.

    Raises: SnapshotError('unknown') if it isn't there, 'pinned' if a pin needs any of it; nothing
    was evicted then.
    """
    shelf = snapshots.shelf
    if extent_id not in shelf.catalog.tree:
        raise SnapshotError(f"there is no extent {extent_id}", reason="unknown")
    pins = shelf.catalog.pins_through(shelf.catalog.tree.subtree(extent_id))
    if pins:
        raise SnapshotError(
            f"extent {extent_id} is needed by {', '.join(sorted(pins))}", reason="pinned"
        )
    removed = shelf.evict_subtree(extent_id)
    snapshots.forget_ready(removed)
    return removed


def forget_key(shelf: Shelf, namespace: str) -> tuple[Forgotten, Removed]:
    """Remove all that is one API key's own: extents, marks, pins, and its tokens in the index.

    What was quarantined and files that no index names go too, since nobody can tell whose they are.
    What all share stays.

    Raises: SnapshotError('io', 'index', 'no_space') if not all of it is gone; again is safe.
    """
    assert namespace
    catalog = shelf.catalog
    own = [extent.id for extent in catalog.tree if extent.namespace == namespace]
    pins = {name for name in catalog.pins if tenant_of(name) == namespace}
    pins |= set(catalog.pins_through(own))
    removed = shelf.forget(own, sorted(pins))
    marks = shelf.forget_marks(namespace)
    refuse_bytes = shelf.files.empty_quarantine() + shelf.clear_refuse()
    shelf.scrub(namespace)
    shelf.tell()
    told = Forgotten(
        extents=len(removed.extents),
        pins=tuple(sorted(pins)),
        marks=marks,
        size_bytes=removed.size_bytes,
        refuse_bytes=refuse_bytes,
    )
    return told, removed


def forget(snapshots: Snapshots, namespace: str) -> Forgotten:
    """As `forget_key`, with its ready files in the staging directory."""
    snapshots.revive()
    told, removed = forget_key(snapshots.shelf, namespace)
    snapshots.forget_ready(removed)
    return told


def leave_room(snapshots: Snapshots, stores: int) -> Removed:
    """Evict so that `stores` of one root have room: behind this one half an equal part is free.

    A store that is closed evicts nothing for others. So it leaves them that much, unless it has
    less than an equal part itself.

    Raises: SnapshotError('index', 'no_space') if the index can't be written.
    """
    snapshots.revive()
    shelf = snapshots.shelf
    quota_bytes = shelf.settings.quota_bytes
    others_bytes = sum(one.size_bytes for one in shelf.neighbours.look() if one.owner is not None)
    free_bytes = quota_bytes // (2 * stores)
    return shelf.evict(max(quota_bytes // stores, quota_bytes - others_bytes - free_bytes))


def evict_unused(snapshots: Snapshots, before_s: float) -> Removed:
    """Evict what wasn't used since `before_s`, and unpin what was learned and not used since.

    Other pins keep their prefixes, and what is used keeps what it hangs off.

    Raises: SnapshotError('index', 'no_space') if a pin can't be removed from the index.
    """
    snapshots.revive()
    shelf, catalog = snapshots.shelf, snapshots.shelf.catalog

    def used_s(extent_id: int) -> float:
        return max(catalog.uses(extent_id).used_s, catalog.row(extent_id).created_s)

    old = [
        pin.name
        for pin in catalog.pins.values()
        if pin.origin is Origin.LEARNED
        and max(pin.used_s or pin.created_s, used_s(pin.extent_id)) < before_s
    ]
    for name in old:
        snapshots.unpin(name)
    kept: set[int | None] = set()
    unused = []
    # A child's number is greater than its parent's.
    for extent in sorted(catalog.tree, key=lambda extent: -extent.id):
        is_needed = extent.id in kept or catalog.is_pinned(extent.id)
        if is_needed or used_s(extent.id) >= before_s:
            kept.add(extent.parent)
        else:
            unused.append(extent.id)
    removed = shelf.forget(unused, ()) if unused else Removed()
    shelf.counts.evicted_extents += len(removed.extents)
    shelf.counts.evicted_bytes += removed.size_bytes
    snapshots.forget_ready(removed)
    return replace(removed, pins=tuple(old))
