"""Slot files, taken apart and put together: what is kept, and what is refused."""

from __future__ import annotations

import mmap
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile import (
    Layout,
    RowsPart,
    SlotFile,
    SlotFileError,
    assemble,
    boundary_end,
    file_tokens,
    parse,
    round_trip_ok,
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
    window_spec,
)

PLAIN, SLIDING, HYBRID = MemoryKind.PLAIN, MemoryKind.SLIDING_WINDOW, MemoryKind.HYBRID
CORPUS = Path(__file__).parents[1] / "corpus" / "slotfile"
CORPUS_FILES = sorted(CORPUS.glob("*.slot"))


def kind_of(path: Path) -> MemoryKind:
    return MemoryKind(path.name.split("-")[0])


def read(data: bytes, kind: MemoryKind = PLAIN) -> SlotFile:
    return parse(data, kind=kind, max_tokens=100)


def part(source: SlotFile, lo: int, hi: int, take: int | None = None) -> RowsPart:
    return RowsPart(b"".join(source.rows(lo, hi)), lo, hi, hi if take is None else take)


def written(
    source: SlotFile, *parts: RowsPart, boundary: memoryview | None = None, mend: bool = True
) -> bytes:
    return b"".join(
        assemble(
            source.layout,
            tokens=source.tokens[: parts[-1].take],
            parts=parts,
            boundary=boundary,
            streams=source.streams,
            slot=source.slot,
            mend=mend,
        )
    )


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(SlotFileError) as caught:
        work()
    assert caught.value.reason in get_args(Reason)
    return caught.value.reason


def refused(data: bytes, kind: MemoryKind = PLAIN) -> str:
    return refusal(lambda: read(data, kind))


def with_media(spec: FileSpec, *spans: int) -> FileSpec:
    """A file whose tokens in [spans[0], spans[1]), [spans[2], ...) are a picture's."""
    tokens = list(spec.tokens)
    starts, ends = spans[::2], spans[1::2]
    for start, end in zip(starts, ends, strict=True):
        tokens[start:end] = [-1] * (end - start)
    chunks = [word for start in starts for word in (8, start, 77)]
    return replace(spec, tokens=tokens, tail=(len(starts), *reversed(starts), *chunks, 0))


class TestMedia:
    """A slot with pictures is what it was before the first of them."""

    def test_rows_and_tokens_before_the_first_picture_are_those_of_the_text_alone(self) -> None:
        spec = plain_file(12)
        found, text = read(with_media(spec, 5, 8, 9, 11).to_bytes()), read(spec.to_bytes())
        assert found.tokens.tolist() == spec.tokens[:5]
        assert (found.held_tokens, found.is_cut, text.is_cut) == (12, True, False)
        assert found.layout == text.layout
        assert found.rows(1, 5) == text.rows(1, 5)
        with pytest.raises(IndexError):
            found.rows(0, 6)

    def test_what_is_made_of_them_is_a_file_of_text(self) -> None:
        spec = plain_file(12, v_trans=True)
        found = read(with_media(spec, 5, 8).to_bytes())
        short = replace(spec, tokens=spec.tokens[:5], rows=spec.rows.cut(0, 5))
        assert written(found, part(found, 0, 5)) == short.to_bytes()

    def test_a_hybrid_or_a_window_has_the_checkpoints_before_the_picture_and_no_end(self) -> None:
        states = [(end, 0, recurrent_state(end, seed=end)) for end in (9, 3, 5)]
        spec = replace(with_media(hybrid_file(12), 5, 8), appendix=checkpoints(*states))
        found = read(spec.to_bytes(), HYBRID)
        assert found.boundary() is None
        assert [c.end_tokens for c in found.checkpoints] == [3, 5]
        assert bytes(found.checkpoints[0].boundary) == states[1][2]
        windows = [(4, 0, window_spec(4, size=3).cache(slot=0, streams=1))]
        spec = replace(with_media(sliding_file(12), 5, 8), appendix=checkpoints(*windows))
        found = read(spec.to_bytes(), SLIDING)
        assert (found.boundary(), [c.end_tokens for c in found.checkpoints]) == (None, [4])

    @given(
        count=st.integers(2, 40),
        spans=st.lists(st.tuples(st.integers(1, 39), st.integers(1, 9)), min_size=1, max_size=4),
        damage=st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)),
    )
    def test_no_row_of_a_picture_is_ever_given(
        self, count: int, spans: list[tuple[int, int]], damage: tuple[int, int]
    ) -> None:
        taken: list[int] = []
        for start, size in sorted(spans):
            if start < count and start >= max(taken, default=0):
                taken += [start, min(start + size, count)]
        spec = with_media(plain_file(count), *taken)
        raw = bytearray(spec.to_bytes())
        if taken:
            found = read(bytes(raw))
            assert found.tokens.tolist() == plain_file(count).tokens[: taken[0]]
        at, by = damage
        raw[at % len(raw)] ^= by
        with suppress(SlotFileError):
            found = read(bytes(raw))
            assert found.tokens.min(initial=0) >= 0
            found.rows(0, len(found.tokens))


class TestPartedPositions:
    """M-RoPE: cells say more of themselves."""

    @pytest.mark.parametrize(("slot", "streams"), [(0, 1), (1, 3)])
    def test_a_file_is_taken_apart_and_put_together_again(self, slot: int, streams: int) -> None:
        spec = parted(plain_file(6, slot=slot, streams=streams))
        found = read(spec.to_bytes())
        assert (found.layout.rows.cell_words, found.slot) == (3, slot)
        assert round_trip_ok(spec.to_bytes(), PLAIN)
        short = replace(spec, tokens=spec.tokens[:4], rows=spec.rows.cut(0, 4))
        assert written(found, part(found, 0, 4)) == short.to_bytes()
        assert Layout.from_json(found.layout.to_json()) == found.layout
        assert found.layout != read(plain_file(6).to_bytes()).layout

    def test_a_hybrids_too(self) -> None:
        assert round_trip_ok(parted(hybrid_file(6)).to_bytes(), HYBRID)

    @pytest.mark.parametrize("wrong", [(3, 2, 0), (2, 3, 0), (2, 2, -5)])
    def test_cells_that_say_otherwise_than_the_tokens_are_refused(
        self, wrong: tuple[int, ...]
    ) -> None:
        spec = parted(plain_file(6))
        words = list(spec.rows.words or ())
        words[2] = wrong[0], wrong[1], wrong[2] or words[2][2]
        assert refused(replace(spec, rows=replace(spec.rows, words=words)).to_bytes()) == "position"

    @pytest.mark.parametrize("hybrid", [False, True])
    def test_a_picture_whose_cells_share_a_position_is_no_hindrance(self, hybrid: bool) -> None:
        # Tokens 5 to 7 are a picture of two rows: they take two positions, and so what follows.
        plain = parted(hybrid_file(10) if hybrid else plain_file(10))
        words = [*(plain.rows.words or ())[:5], (5, 5, -1), (6, 5, -1), (5, 6, -1)]
        words += [(at, at, token) for at, token in zip((7, 8), plain.tokens[8:], strict=True)]
        positions = [0, 1, 2, 3, 4, 5, 5, 5, 7, 8]
        spec = with_media(plain, 5, 8)
        spec = replace(spec, rows=replace(spec.rows, words=words, positions=positions))
        if hybrid:
            # The checkpoint behind the picture is at nine tokens and eight positions.
            states = checkpoints((4, 0, recurrent_state(4)), (8, 0, recurrent_state(8)))
            at = states.rindex(struct.pack("<qii", 8, 0, 7))
            states = states[:at] + struct.pack("<q", 9) + states[at + 8 :]
            spec = replace(spec, recurrent=recurrent_state(9), appendix=states)
        found = read(spec.to_bytes(), HYBRID if hybrid else PLAIN)
        assert found.tokens.tolist() == plain.tokens[:5]
        assert [c.end_tokens for c in found.checkpoints] == ([4] if hybrid else [])
        whole = read(plain.to_bytes(), HYBRID if hybrid else PLAIN)
        assert found.rows(0, 5) == whole.rows(0, 5)
        if hybrid:
            early = spec.appendix.replace(
                struct.pack("<qii", 4, 0, 3), struct.pack("<qii", 5, 0, 3)
            )
            assert refused(replace(spec, appendix=early).to_bytes(), HYBRID) == "checkpoints"
        moved = replace(spec, rows=replace(spec.rows, positions=[0, 1, 2, 3, 4, 4, 5, 5, 7, 8]))
        assert refused(moved.to_bytes(), HYBRID if hybrid else PLAIN) == "position"


class TestParse:
    def test_tokens_slot_and_layout_are_read(self) -> None:
        spec = plain_file(6, slot=2, streams=4)
        found = read(spec.to_bytes())
        assert found.tokens.tolist() == spec.tokens
        assert (found.slot, found.streams, found.boundary()) == (2, 4, None)
        assert found.layout.row_bytes == spec.rows.row_bytes
        assert found.layout.rows_bytes(3) == 3 * spec.rows.row_bytes

    def test_rows_come_in_the_order_of_layers_first_k_then_v(self) -> None:
        spec = plain_file(6)
        payload = b"".join(read(spec.to_bytes()).rows(2, 5))
        tensors = (*spec.rows.keys, *spec.rows.values)
        assert payload == b"".join(tensor[2:5].tobytes() for tensor in tensors)
        assert len(payload) == read(spec.to_bytes()).layout.rows_bytes(3)

    def test_rows_outside_the_file_are_an_index_error(self) -> None:
        found = read(plain_file(6).to_bytes())
        for lo, hi in ((-1, 3), (3, 7), (4, 3)):
            with pytest.raises(IndexError):
                found.rows(lo, hi)

    def test_no_row_is_copied(self) -> None:
        data = np.frombuffer(plain_file(6).to_bytes(), np.uint8)
        found = parse(data, kind=PLAIN, max_tokens=100)
        for row in found.rows(1, 4):
            assert np.shares_memory(np.frombuffer(row, np.uint8), data)

    def test_scattered_cells_come_in_the_order_of_positions(self) -> None:
        spec = plain_file(6)
        order = [3, 4, 5, 0, 1, 2]
        scattered = replace(
            spec,
            rows=replace(
                spec.rows,
                keys=[k[order] for k in spec.rows.keys],
                values=[v[order] for v in spec.rows.values],
                positions=order,
            ),
        )
        found = read(scattered.to_bytes())
        assert not found.is_in_order
        assert b"".join(found.rows(1, 5)) == b"".join(read(spec.to_bytes()).rows(1, 5))
        assert written(found, part(found, 0, 6)) == spec.to_bytes()

    def test_the_header_alone_gives_the_tokens_of_any_state(self) -> None:
        spec = plain_file(6)
        header = spec.to_bytes()[: 12 + 4 * 10]
        assert file_tokens(header + b"a state of an unknown kind").tolist() == spec.tokens

    def test_an_unknown_beginning_is_refused(self) -> None:
        data = plain_file(3).to_bytes()
        assert refused(b"GGUF" + data[4:]) == "magic"
        assert refused(data[:4] + struct.pack("<I", 3) + data[8:]) == "version"
        assert refused(data[:12] + struct.pack("<i", 0) + data[16:]) == "tokens"
        assert refused(b"") == "truncated"

    def test_a_whole_snapshot_of_a_prompt_with_media_is_refused(self) -> None:
        for spec in (with_media(plain_file(9), 3, 5), replace(plain_file(3), tail=(1,))):
            assert refusal(lambda spec=spec: file_tokens(spec.to_bytes())) == "media"  # type: ignore[misc]

    def test_media_that_dont_begin_where_a_token_says_so_are_refused(self) -> None:
        spec = plain_file(3)
        assert refused(replace(spec, tail=(1, 7, 7)).to_bytes()) == "media"
        assert refused(replace(spec, tail=(1,)).to_bytes()) == "media"
        for tail in ((0,), (1,), (1, 2, 4, 0), (-1, 1)):
            assert refused(replace(spec, tokens=[5, -1, 6], tail=tail).to_bytes()) == "media"

    def test_nothing_comes_before_media_at_the_very_beginning(self) -> None:
        assert refused(with_media(plain_file(6), 0, 2).to_bytes()) == "media"

    def test_more_tokens_than_fit_are_refused(self) -> None:
        data = plain_file(6).to_bytes()
        assert parse(data, kind=PLAIN, max_tokens=6).tokens.size == 6
        assert refusal(lambda: parse(data, kind=PLAIN, max_tokens=5)) == "tokens"

    def test_an_empty_slots_file_is_refused(self) -> None:
        data = struct.pack("<3I4i", 0x67677371, 4, 4, -1, 1, 0, 0) + struct.pack("<5I", 4, *[0] * 4)
        assert refused(data) == "empty"

    @pytest.mark.parametrize("positions", [(0, 1, 3), (1, 2, 3), (0, 1, 1), (-1, 0, 1)])
    def test_positions_that_arent_the_tokens_are_refused(self, positions: Sequence[int]) -> None:
        spec = plain_file(3)
        wrong = replace(spec, rows=replace(spec.rows, positions=positions))
        assert refused(wrong.to_bytes()) == "position"

    def test_rows_of_another_number_of_tokens_are_refused(self) -> None:
        spec = plain_file(3)
        assert refused(replace(spec, tokens=[1, 2]).to_bytes()) == "tokens"

    def test_cells_of_two_streams_are_refused(self) -> None:
        spec = plain_file(3)
        two = struct.pack("<I", 2) + spec.rows.block(0) + spec.rows.block(1)
        header = spec.to_bytes()[: 12 + 4 * 7]
        assert refused(header + two) == "streams"
        assert refused(header + struct.pack("<I", 0)) == "streams"
        assert refused(header + struct.pack("<I", 2**32 - 1)) == "streams"

    def test_cells_of_other_sequences_are_refused(self) -> None:
        data = bytearray(plain_file(3).to_bytes())
        first = 12 + 4 * 7 + 8
        for offset, value in ((4, 2), (4, 0), (8, 1), (8, -1)):
            changed = bytearray(data)
            struct.pack_into("<i", changed, first + offset, value)
            assert refused(bytes(changed)) == "sequence"
        in_another_stream = plain_file(3, slot=1, streams=2).to_bytes()
        at = 12 + 4 * 7 + 4
        swapped = in_another_stream[:at] + in_another_stream[at + 4 :] + bytes(4)
        assert refused(swapped) == "sequence"

    def test_bytes_after_the_end_are_refused(self) -> None:
        assert refused(plain_file(3).to_bytes() + b"\0") == "trailing"
        assert refused(sliding_file(7).to_bytes()) == "trailing"

    @pytest.mark.parametrize("claimed", [4, 2**16, 2**31 - 1, 2**32 - 1])
    def test_nothing_is_allocated_by_a_claimed_size(self, claimed: int) -> None:
        data = plain_file(3).to_bytes()
        tracemalloc.start()
        try:
            for at in range(8, len(data) - 4, 4):
                changed = bytearray(data)
                struct.pack_into("<I", changed, at, claimed)
                with suppress(SlotFileError):
                    read(bytes(changed))
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


class TestBoundary:
    def test_a_window_is_kept_as_it_lies_in_the_file(self) -> None:
        spec = sliding_file(9)
        assert spec.window is not None
        found = read(spec.to_bytes(), SLIDING)
        boundary = found.boundary()
        assert boundary is not None
        assert bytes(boundary) == spec.window.block(0)
        assert window_range(found.layout, boundary) == (4, 9)
        assert boundary_end(found.layout, boundary) == 9

    def test_a_recurrent_state_is_kept_as_it_lies_in_the_file(self) -> None:
        found = read(hybrid_file(9).to_bytes(), HYBRID)
        boundary = found.boundary()
        assert boundary is not None
        assert bytes(boundary) == recurrent_state(9)
        assert boundary_end(found.layout, boundary) == 9

    def test_checkpoints_give_the_state_of_earlier_ends(self) -> None:
        early, late = window_spec(4, size=5, seed=20), window_spec(7, size=5, seed=30)
        appendix = checkpoints(
            (7, 2, late.cache(slot=0, streams=1)), (4, 0, early.cache(slot=0, streams=1))
        )
        found = read(replace(sliding_file(9), appendix=appendix).to_bytes(), SLIDING)
        assert [(c.end_tokens, bytes(c.boundary)) for c in found.checkpoints] == [
            (7, late.block(0)),
            (4, early.block(0)),
        ]
        assert found.appendix == appendix

    def test_a_hybrids_checkpoints_are_told_from_its_state(self) -> None:
        appendix = checkpoints((4, 3, recurrent_state(4, seed=40)))
        found = read(replace(hybrid_file(9), appendix=appendix).to_bytes(), HYBRID)
        boundary = found.boundary()
        assert boundary is not None
        assert bytes(boundary) == recurrent_state(9)
        assert [c.end_tokens for c in found.checkpoints] == [4]
        assert bytes(found.checkpoints[0].boundary) == recurrent_state(4, seed=40)

    @pytest.mark.parametrize(
        "appendix",
        [
            checkpoints((4, 3, recurrent_state(4)), version=2),
            checkpoints((4, 3, recurrent_state(5))),
            checkpoints((4, 3, recurrent_state(4) + b"\0" * 12)),
            checkpoints((4, 3, recurrent_state(4, layers=2))),
            checkpoints((10, 9, recurrent_state(10))),
            checkpoints((4, 4, recurrent_state(4))),
            struct.pack("<4s2I", b"SCKP", 1, 2**31),
            struct.pack("<4s2I", b"SCKP", 1, 1),
        ],
    )
    def test_an_appendix_that_isnt_understood_is_refused(self, appendix: bytes) -> None:
        data = replace(hybrid_file(9), appendix=appendix).to_bytes()
        assert refused(data, HYBRID) in {"checkpoints", "truncated", "layout"}

    def test_a_window_that_doesnt_lead_to_the_end_is_refused(self) -> None:
        spec = sliding_file(9)
        assert spec.window is not None
        for positions in ((4, 5, 6, 7, 9), (3, 4, 5, 6, 7), (-1, 0, 1, 2, 3), (8, 8, 8, 8, 8)):
            wrong = replace(spec, window=replace(spec.window, positions=positions))
            assert refused(wrong.to_bytes(), SLIDING) == "position"

    def test_a_windows_cells_may_lie_in_any_order(self) -> None:
        spec = sliding_file(9)
        assert spec.window is not None
        turned = replace(spec, window=replace(spec.window, positions=(7, 8, 4, 5, 6)))
        found = read(turned.to_bytes(), SLIDING)
        boundary = found.boundary()
        assert boundary is not None
        assert window_range(found.layout, boundary) == (4, 9)

    def test_a_recurrent_state_of_another_end_is_refused(self) -> None:
        wrong = replace(hybrid_file(9), recurrent=recurrent_state(8))
        assert refused(wrong.to_bytes(), HYBRID) == "position"

    def test_a_file_without_its_boundary_state_is_refused(self) -> None:
        data = plain_file(9).to_bytes()
        assert refused(data, SLIDING) == "truncated"
        assert refused(data, HYBRID) == "truncated"


class TestAssemble:
    @pytest.mark.parametrize("v_trans", [False, True])
    def test_a_cut_is_the_file_of_its_tokens(self, v_trans: bool) -> None:
        spec = plain_file(7, v_trans=v_trans)
        found = read(spec.to_bytes())
        for cut in range(1, 8):
            shorter = replace(spec, tokens=spec.tokens[:cut], rows=spec.rows.cut(0, cut))
            assert written(found, part(found, 0, cut)) == shorter.to_bytes()
            assert written(found, part(found, 0, 7, take=cut)) == shorter.to_bytes()

    @pytest.mark.parametrize("v_trans", [False, True])
    def test_parts_of_two_files_make_a_whole(self, v_trans: bool) -> None:
        spec = plain_file(9, v_trans=v_trans)
        whole = read(spec.to_bytes())
        base_spec = replace(spec, tokens=spec.tokens[:5], rows=spec.rows.cut(0, 5))
        base = read(base_spec.to_bytes())
        parts = [part(base, 0, 5, take=3), part(whole, 3, 6), part(whole, 6, 9)]
        assert written(whole, *parts) == spec.to_bytes()

    def test_the_slot_and_streams_asked_for_are_written(self) -> None:
        spec = plain_file(5, slot=3, streams=4)
        found = read(spec.to_bytes())
        for slot, streams in ((0, 1), (2, 1), (0, 4), (1, 2)):
            made = assemble(
                found.layout,
                tokens=found.tokens,
                parts=[part(found, 0, 5)],
                boundary=None,
                streams=streams,
                slot=slot,
            )
            assert b"".join(made) == replace(spec, slot=slot, streams=streams).to_bytes()
        for slot, streams in ((2, 2), (0, 0), (0, 257), (256, 1), (-1, 1)):
            assert (
                refusal(
                    lambda slot=slot, streams=streams: assemble(  # type: ignore[misc]
                        found.layout,
                        tokens=found.tokens,
                        parts=[part(found, 0, 5)],
                        boundary=None,
                        streams=streams,
                        slot=slot,
                    )
                )
                == "streams"
            )

    def test_a_mapped_parts_rows_arent_copied(self, tmp_path: Path) -> None:
        found = read(plain_file(9).to_bytes())
        path = tmp_path / "extent"
        path.write_bytes(b"".join(found.rows(0, 9)))
        with path.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        whole = np.frombuffer(mapped, np.uint8)
        made = assemble(
            found.layout,
            tokens=found.tokens,
            parts=[RowsPart(mapped, 0, 9, 9)],
            boundary=None,
            streams=1,
        )
        shared = [p for p in made if np.shares_memory(np.frombuffer(p, np.uint8), whole)]
        assert sum(map(len, shared)) == len(whole)

    def test_parts_that_dont_continue_each_other_are_refused(self) -> None:
        found = read(plain_file(9).to_bytes())
        for parts in (
            [part(found, 1, 9)],
            [part(found, 0, 4), part(found, 5, 9)],
            [part(found, 0, 4), part(found, 3, 9)],
            [part(found, 0, 4), replace_take(part(found, 4, 9), 4), part(found, 4, 9)],
            [replace_take(part(found, 0, 4), 5), part(found, 5, 9)],
            [RowsPart(b"".join(found.rows(0, 9))[:-1], 0, 9, 9)],
        ):
            assert refusal(lambda parts=parts: written(found, *parts)) == "parts"  # type: ignore[misc]

    def test_rows_for_fewer_or_more_tokens_are_refused(self) -> None:
        found = read(plain_file(9).to_bytes())
        for count in (8, 10):
            tokens = np.zeros(count, np.int32)
            assert (
                refusal(
                    lambda tokens=tokens: assemble(  # type: ignore[misc]
                        found.layout,
                        tokens=tokens,
                        parts=[part(found, 0, 9)],
                        boundary=None,
                        streams=1,
                    )
                )
                == "parts"
            )

    def test_boundary_state_of_another_end_is_refused(self) -> None:
        found, other = (read(sliding_file(n).to_bytes(), SLIDING) for n in (9, 8))
        recurrent, earlier = (read(hybrid_file(n).to_bytes(), HYBRID) for n in (9, 8))
        for source, boundary in (
            (found, other.boundary()),
            (found, None),
            (recurrent, earlier.boundary()),
            (recurrent, None),
            (recurrent, found.boundary()),
        ):
            reason = refusal(
                lambda source=source, boundary=boundary: written(  # type: ignore[misc]
                    source, part(source, 0, 9), boundary=boundary
                )
            )
            assert reason in {"boundary", "layout"}
        plain = read(plain_file(9).to_bytes())
        assert (
            refusal(lambda: written(plain, part(plain, 0, 9), boundary=found.boundary()))
            == "boundary"
        )

    @pytest.mark.parametrize("v_trans", [False, True])
    def test_two_masked_rows_are_put_before_a_window(self, v_trans: bool) -> None:
        spec = sliding_file(9, v_trans=v_trans)
        assert spec.window is not None
        found = read(spec.to_bytes(), SLIDING)
        made = written(found, part(found, 0, 9), boundary=found.boundary())
        rows = [0, 0, *range(5)]
        mended = CacheSpec(
            [k[rows] for k in spec.window.keys],
            [v[rows] for v in spec.window.values],
            v_trans=v_trans,
            positions=range(2, 9),
        )
        assert made == replace(spec, window=mended).to_bytes()

    def test_a_window_from_position_1_gets_one_row_as_positions_start_at_0(self) -> None:
        found = read(sliding_file(6).to_bytes(), SLIDING)
        made = read(written(found, part(found, 0, 6), boundary=found.boundary()), SLIDING)
        boundary = made.boundary()
        assert boundary is not None
        assert window_range(made.layout, boundary) == (0, 6)
        assert made.checkpoints == ()

    def test_a_window_from_position_0_gets_a_checkpoint_of_itself(self) -> None:
        spec = sliding_file(4)
        assert spec.window is not None
        found = read(spec.to_bytes(), SLIDING)
        made = written(found, part(found, 0, 4), boundary=found.boundary())
        appendix = checkpoints((4, 0, spec.window.cache(slot=0, streams=1)))
        assert made == replace(spec, appendix=appendix).to_bytes()

    @pytest.mark.parametrize("count", [4, 9])
    def test_all_of_a_file_is_in_the_slot_asked_for(self, count: int) -> None:
        spec = sliding_file(count)
        found = read(spec.to_bytes(), SLIDING)
        made = {
            slot: b"".join(
                assemble(
                    source.layout,
                    tokens=source.tokens,
                    parts=[part(source, 0, count)],
                    boundary=source.boundary(),
                    streams=4,
                    slot=2,
                )
            )
            for slot, source in (
                (0, found),
                (3, read(replace(spec, slot=3, streams=4).to_bytes(), SLIDING)),
            )
        }
        assert made[0] == made[3]
        assert read(made[0], SLIDING).slot == 2

    def test_without_the_mend_a_window_is_as_it_was_saved(self) -> None:
        for count in (4, 9):
            spec = sliding_file(count)
            found = read(spec.to_bytes(), SLIDING)
            made = written(found, part(found, 0, count), boundary=found.boundary(), mend=False)
            assert made == spec.to_bytes()

    def test_rows_and_a_hybrids_state_make_its_file(self) -> None:
        spec = hybrid_file(9)
        found = read(spec.to_bytes(), HYBRID)
        parts = [part(found, 0, 4), part(found, 4, 9)]
        assert written(found, *parts, boundary=found.boundary()) == spec.to_bytes()

    def test_no_tokens_and_tokens_of_media_are_refused(self) -> None:
        found = read(plain_file(3).to_bytes())
        for tokens, reason in (([], "empty"), ([5, -1, 6], "media")):
            assert (
                refusal(
                    lambda tokens=tokens: assemble(  # type: ignore[misc]
                        found.layout,
                        tokens=np.array(tokens, np.int32),
                        parts=[part(found, 0, 3)],
                        boundary=None,
                        streams=1,
                    )
                )
                == reason
            )


def replace_take(source: RowsPart, take: int) -> RowsPart:
    return RowsPart(source.payload, source.lo, source.hi, take)


class TestRoundTrip:
    @pytest.mark.parametrize("path", CORPUS_FILES, ids=lambda path: path.name)
    def test_files_the_engine_wrote_come_out_as_they_went_in(self, path: Path) -> None:
        assert round_trip_ok(path.read_bytes(), kind_of(path))

    def test_there_is_a_file_of_every_kind_of_memory(self) -> None:
        assert {kind_of(path) for path in CORPUS_FILES} == set(MemoryKind)

    @pytest.mark.parametrize("path", CORPUS_FILES, ids=lambda path: path.name)
    def test_a_file_taken_for_another_kind_isnt_ok(self, path: Path) -> None:
        for kind in set(MemoryKind) - {kind_of(path)}:
            assert not round_trip_ok(path.read_bytes(), kind)

    @pytest.mark.parametrize(
        ("spec", "kind"),
        [(plain_file(1), PLAIN), (sliding_file(1), SLIDING), (hybrid_file(1), HYBRID)],
    )
    def test_a_single_token_is_enough(self, spec: FileSpec, kind: MemoryKind) -> None:
        assert round_trip_ok(spec.to_bytes(), kind)

    def test_what_isnt_understood_isnt_ok(self) -> None:
        data = plain_file(5).to_bytes()
        assert not round_trip_ok(data[:-1], PLAIN)
        assert not round_trip_ok(data + b"\0", PLAIN)
        assert not round_trip_ok(b"", PLAIN)


class TestLayout:
    @pytest.mark.parametrize(
        ("spec", "kind"),
        [
            (plain_file(3, v_trans=True), PLAIN),
            (sliding_file(9), SLIDING),
            (hybrid_file(9), HYBRID),
        ],
    )
    def test_a_stored_layout_is_the_same(self, spec: FileSpec, kind: MemoryKind) -> None:
        layout = read(spec.to_bytes(), kind).layout
        assert Layout.from_json(layout.to_json()) == layout

    def test_layouts_that_a_restore_would_refuse_differ(self) -> None:
        spec = plain_file(3)
        layouts = [
            read(replace(spec, rows=rows).to_bytes()).layout
            for rows in (
                spec.rows,
                replace(spec.rows, v_trans=True),
                replace(spec.rows, v_trans=True, element_bytes=4),
                replace(spec.rows, types=(8, 1)),
                replace(spec.rows, types=(1, 8)),
                replace(spec.rows, rotation=(0, 1)),
                CacheSpec.random(1, tokens=3, layers=3),
                CacheSpec.random(1, tokens=3, row_bytes=6),
            )
        ]
        assert len(set(layouts)) == len(layouts)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "null", '{"version":4,"kind":"plain"}', "\xff", "[" * 5000]
    )
    def test_what_isnt_a_layout_is_refused(self, text: str) -> None:
        assert refusal(lambda: Layout.from_json(text)) == "layout"

    def test_a_layout_with_impossible_numbers_is_refused(self) -> None:
        text = read(plain_file(3, v_trans=True).to_bytes()).layout.to_json()
        for old, new in (
            ("[1,8,2]", "[1,8,0]"),
            ("[1,8,2]", "[1,8,3]"),
            ("[1,8,2]", "[1,8,2,2]"),
            ("[1,8,0]", "[1,0,0]"),
            ("[1,8,0]", "[1,-8,0]"),
            ("[1,8,0]", "[1,8.5,0]"),
            ('"v_trans":true', '"v_trans":1'),
            ('"plain"', '"other"'),
        ):
            assert old in text
            changed = text.replace(old, new, 1)
            assert refusal(lambda changed=changed: Layout.from_json(changed)) == "layout"  # type: ignore[misc]
