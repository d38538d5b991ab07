"""Slot files that were damaged, in ways that Hypothesis finds."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile import (
    RowsPart,
    SlotFile,
    SlotFileError,
    assemble,
    parse,
    window_range,
)
from keepwarm.slotfile.layout import Reason
from slotfile_bytes import (
    CacheSpec,
    FileSpec,
    checkpoints,
    hybrid_file,
    parted,
    plain_file,
    recurrent_state,
    sliding_file,
)

MAX_TOKENS = 64

FILES: list[tuple[MemoryKind, bytes]] = [
    (MemoryKind.PLAIN, plain_file(4, slot=1, streams=3).to_bytes()),
    (MemoryKind.PLAIN, plain_file(4, v_trans=True).to_bytes()),
    (MemoryKind.SLIDING_WINDOW, sliding_file(9).to_bytes()),
    (MemoryKind.SLIDING_WINDOW, sliding_file(3, v_trans=True).to_bytes()),
    (MemoryKind.SLIDING_WINDOW, sliding_file(4, size=1).to_bytes()),
    (MemoryKind.HYBRID, hybrid_file(4).to_bytes()),
    (MemoryKind.PLAIN, parted(plain_file(5, slot=1, streams=2)).to_bytes()),
    (
        MemoryKind.HYBRID,
        replace(hybrid_file(6), appendix=checkpoints((3, 2, recurrent_state(3)))).to_bytes(),
    ),
]
BAD_NUMBERS = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]


def parsed(data: bytes, kind: MemoryKind) -> SlotFile | None:
    """The file, or None when it is refused for a reason that can be counted."""
    try:
        return parse(data, kind=kind, max_tokens=MAX_TOKENS)
    except SlotFileError as error:
        reason = error.reason
    assert reason in get_args(Reason)
    return None


def rewritten(found: SlotFile, *, mend: bool) -> bytes:
    """What would be handed to the engine."""
    count = len(found.tokens)
    return b"".join(
        assemble(
            found.layout,
            tokens=found.tokens,
            parts=[RowsPart(b"".join(found.rows(0, count)), 0, count, count)],
            boundary=found.boundary(),
            streams=found.streams,
            slot=found.slot,
            mend=mend,
        )
    )


def check_usable(found: SlotFile) -> None:
    """Whatever is accepted can be used: read whole, and written as a file that is sound."""
    count = len(found.tokens)
    assert 0 < count <= MAX_TOKENS
    assert sum(map(len, found.rows(0, count))) == found.layout.rows_bytes(count)
    again = parsed(rewritten(found, mend=False), found.layout.kind)
    assert again is not None
    assert again.layout == found.layout
    assert again.boundary() == found.boundary()
    assert b"".join(again.rows(0, count)) == b"".join(found.rows(0, count))
    mended = parsed(rewritten(found, mend=True), found.layout.kind)
    assert mended is not None
    boundary = mended.boundary()
    if found.layout.kind is MemoryKind.SLIDING_WINDOW:
        assert boundary is not None
        assert window_range(mended.layout, boundary)[0] >= 0


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_changed_bytes_are_refused_or_make_a_usable_file(
    file: tuple[MemoryKind, bytes], data: st.DataObject
) -> None:
    kind, whole = file
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 4))
        if data.draw(st.booleans()):
            changed[at] ^= data.draw(st.integers(1, 255))
        else:
            struct.pack_into("<I", changed, at, data.draw(st.sampled_from(BAD_NUMBERS)))
    found = parsed(bytes(changed), kind)
    if found is not None:
        check_usable(found)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.sampled_from(MemoryKind), st.data())
def test_bytes_put_in_or_left_out_are_refused_or_make_a_usable_file(
    file: tuple[MemoryKind, bytes], kind: MemoryKind, data: st.DataObject
) -> None:
    whole = file[1]
    at = data.draw(st.integers(0, len(whole)))
    until = data.draw(st.integers(at, len(whole)))
    again = data.draw(st.integers(0, len(whole)))
    found = parsed(whole[:at] + whole[again : again + 64] + whole[until:], kind)
    if found is not None:
        check_usable(found)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(MemoryKind))
def test_bytes_of_any_kind_after_a_sound_header_are_survived(
    noise: bytes, kind: MemoryKind
) -> None:
    header = plain_file(2).to_bytes()[: 12 + 4 * 6]
    found = parsed(header + noise, kind)
    if found is not None:
        check_usable(found)


def test_every_truncation_is_refused_or_of_another_layout() -> None:
    for kind, whole in FILES:
        layout = parse(whole, kind=kind, max_tokens=MAX_TOKENS).layout
        for size in range(len(whole)):
            found = parsed(whole[:size], kind)
            if found is None:
                continue
            # A recurrent state may end after any of its tensors, and an appendix may be missing.
            assert kind is MemoryKind.HYBRID
            assert found.layout != layout or (not found.appendix and b"SCKP" in whole)


@st.composite
def specs(draw: st.DrawFn) -> FileSpec:
    """Plain files of any shape."""
    count = draw(st.integers(1, 12))
    layers = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 1000))
    v_trans = draw(st.booleans())
    elements = draw(st.integers(1, 5))
    rows = CacheSpec.random(
        seed, tokens=count, layers=layers, row_bytes=2 * elements, v_trans=v_trans
    )
    streams = draw(st.integers(1, 5))
    slot = draw(st.integers(0, streams - 1 if streams > 1 else 7))
    order = draw(st.permutations(range(count))) if draw(st.booleans()) else list(range(count))
    scattered = replace(
        rows,
        keys=[k[order] for k in rows.keys],
        values=[v[order] for v in rows.values],
        positions=order,
    )
    tokens = [int(t) for t in np.random.default_rng(seed).integers(0, 2**31 - 1, count)]
    return FileSpec(tokens, scattered, slot=slot, streams=streams)


@settings(max_examples=200, deadline=None)
@given(specs(), st.data())
def test_a_file_of_any_shape_cut_into_any_parts_is_put_together_in_order(
    spec: FileSpec, data: st.DataObject
) -> None:
    count = len(spec.tokens)
    assert spec.rows.positions is not None
    back = np.argsort(spec.rows.positions)
    in_order = replace(
        spec,
        rows=replace(
            spec.rows,
            keys=[k[back] for k in spec.rows.keys],
            values=[v[back] for v in spec.rows.values],
            positions=None,
        ),
    )
    found = parse(spec.to_bytes(), kind=MemoryKind.PLAIN, max_tokens=MAX_TOKENS)
    parts: list[RowsPart] = []
    at = 0
    while at < count:
        take = data.draw(st.integers(at + 1, count))
        hi = data.draw(st.integers(take, count))
        parts.append(RowsPart(b"".join(found.rows(at, hi)), at, hi, take))
        at = take
    made = assemble(
        found.layout,
        tokens=found.tokens,
        parts=parts,
        boundary=None,
        streams=spec.streams,
        slot=spec.slot,
    )
    assert b"".join(made) == in_order.to_bytes()
