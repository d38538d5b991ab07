"""The slot-file codec against the real engine: what it writes is what the engine would have."""

from __future__ import annotations

import struct
import urllib.error
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bareengine import BareEngine, Reply, StartEngine
from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile import (
    RowsPart,
    SlotFile,
    assemble,
    boundary_end,
    parse,
    round_trip_ok,
    window_range,
)
from tinymodels import TINY_WINDOW_TOKENS, small_model, write_tiny_gemma3, write_tiny_lfm2

pytestmark = pytest.mark.live

F16, Q8_0 = 1, 8  # ggml's type numbers
CACHES = {
    "f16-flash": {"flash_attn_type": 1},
    "f16-noflash": {"flash_attn_type": 0},
    "q8_0-flash": {"flash_attn_type": 1, "cache_type_k": Q8_0, "cache_type_v": Q8_0},
    # A quantized V needs flash attention.
    "q8_0-noflash": {"flash_attn_type": 0, "cache_type_k": Q8_0, "cache_type_v": F16},
}
POOLS: dict[str, dict[str, Any]] = {"np4": {}, "kvu": {"kv_unified": True}}
LAYOUTS = [f"{cache}-{pool}" for cache in CACHES for pool in POOLS]

TEXT = "The keeper of the lighthouse wrote down every evening: wind, ships, oil."
MORE = " On the last"


def layout_params(name: str) -> dict[str, Any]:
    cache, pool = name.rsplit("-", 1)
    return CACHES[cache] | POOLS[pool]


def read(data: bytes, kind: MemoryKind = MemoryKind.PLAIN) -> SlotFile:
    return parse(data, kind=kind, max_tokens=4096)


def part(source: SlotFile, lo: int, hi: int, take: int | None = None) -> RowsPart:
    return RowsPart(b"".join(source.rows(lo, hi)), lo, hi, hi if take is None else take)


def written(
    source: SlotFile,
    parts: Sequence[RowsPart],
    *,
    streams: int,
    boundary: memoryview | None = None,
    **how: Any,
) -> bytes:
    tokens = source.tokens[: parts[-1].take]
    return b"".join(
        assemble(
            source.layout, tokens=tokens, parts=parts, boundary=boundary, streams=streams, **how
        )
    )


def random_ids(seed: int, count: int) -> list[int]:
    """Tokens of no meaning, for models of none."""
    return [int(i) for i in np.random.default_rng(seed).integers(100, 40_000, count)]


def assert_close(one: Reply, other: Reply) -> None:
    """The first token's likeliest ones are as likely, but for rounding."""
    ours, theirs = dict(one.logprobs[0]), dict(other.logprobs[0])
    both = ours.keys() & theirs.keys()
    assert len(both) >= 3
    for token in both:
        assert ours[token] == pytest.approx(theirs[token], abs=ROUNDING)


@pytest.fixture(scope="module", params=LAYOUTS)
def plain(request: pytest.FixtureRequest, bare_engine: StartEngine) -> BareEngine:
    return bare_engine(small_model(), **layout_params(request.param))


class TestPlainAttention:
    def test_the_engines_file_is_understood(self, plain: BareEngine) -> None:
        plain.clear()
        plain.fill(plain.tokenize(TEXT), slot=2)
        data = plain.save(2)
        assert round_trip_ok(data, MemoryKind.PLAIN)
        found = read(data)
        assert found.tokens.tolist() == plain.tokenize(TEXT)
        assert (found.slot, found.streams) == (2, plain.streams)

    def test_every_cut_answers_like_a_prefill_to_the_same_point(self, plain: BareEngine) -> None:
        ids = plain.tokenize(TEXT)
        asked = ids + plain.tokenize(MORE)
        plain.clear()
        plain.fill(ids, slot=0)
        whole = read(plain.save(0))
        for cut in range(1, len(ids) + 1):
            plain.clear()
            plain.fill(ids[:cut], slot=1)
            warm = plain.ask(asked, slot=1, tokens=2)
            plain.clear()
            plain.restore(written(whole, [part(whole, 0, cut)], streams=plain.streams), slot=3)
            restored = plain.ask(asked, slot=3, tokens=2)
            assert restored == warm
            assert restored.cache_tokens == cut

    def test_one_files_base_and_anothers_tail_are_the_whole_file(self, plain: BareEngine) -> None:
        ids = plain.tokenize(TEXT)
        cut = len(ids) // 2
        plain.clear()
        plain.fill(ids[:cut], slot=0)
        base = read(plain.save(0))
        plain.fill(ids, slot=0)
        data = plain.save(0)
        whole = read(data)
        tail = part(whole, cut, len(ids))
        assert written(whole, [part(base, 0, cut), tail], streams=plain.streams) == data

    def test_parts_used_in_part_give_what_was_in_memory(self, plain: BareEngine) -> None:
        ids = plain.tokenize(TEXT)
        asked = ids[:12] + plain.tokenize(MORE)
        plain.clear()
        plain.fill(ids[:12], slot=0)
        warm = plain.ask(asked, slot=0)
        plain.clear()
        plain.fill(ids, slot=2)
        whole = read(plain.save(2))
        parts = [part(whole, 0, 6, take=4), part(whole, 4, 9), part(whole, 9, len(ids), take=12)]
        assert len(ids) > 12
        plain.clear()
        plain.restore(written(whole, parts, streams=plain.streams), slot=1)
        assert plain.ask(asked, slot=1) == warm

    def test_a_file_for_another_number_of_streams_is_refused(self, plain: BareEngine) -> None:
        plain.fill(plain.tokenize(TEXT), slot=0)
        whole = read(plain.save(0))
        wrong = written(whole, [part(whole, 0, 9)], streams=plain.streams + 1)
        with pytest.raises(urllib.error.HTTPError):
            plain.restore(wrong, slot=0)


def test_scattered_cells_are_put_in_order(bare_engine: StartEngine) -> None:
    engine = bare_engine(small_model(), kv_unified=True, n_ctx=1024)
    ids = random_ids(1, 60)
    engine.fill(ids[:20], slot=0)
    engine.fill(random_ids(2, 20), slot=1)
    engine.fill(ids[:40], slot=0)
    engine.post("/slots/1?action=erase", {})
    engine.fill(ids, slot=0)  # its last tokens take the cells that slot 1 had, among its first
    data = engine.save(0)
    scattered = read(data)
    assert not scattered.is_in_order
    engine.clear()
    for end in (20, 40, 60):
        engine.fill(ids[:end], slot=2)
    in_order = read(engine.save(2))
    assert in_order.is_in_order
    # K and V of the first layer hang on the token and its position alone.
    layers = len(in_order.layout.rows.keys)
    for tensor in (0, layers):
        assert scattered.rows(5, 55)[tensor] == in_order.rows(5, 55)[tensor]
    engine.clear()
    engine.restore(written(scattered, [part(scattered, 0, 50)], streams=1), slot=3)
    assert engine.ask([*ids[:50], 7, 8], slot=3, tokens=1).cache_tokens == 50


# The engine adds up attention in groups of cells, and a restored window begins at cell 0. At these
# ends the groups hold the same tokens as in memory, so that all bits are equal; at others the last
# bits may differ.
EXACT_ENDS = [65, 66, 130, 194]
OTHER_ENDS = [70, 129, 200, 300, 400]
ROUNDING = 0.02  # in a logprob; differences seen are up to 0.005
FITTING_ENDS = [2, 5, 40, 63, 64]


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gemma3.gguf"
    write_tiny_gemma3(path, small_model())
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def sliding(request: pytest.FixtureRequest, bare_engine: StartEngine, gemma3: Path) -> BareEngine:
    return bare_engine(gemma3, **layout_params(request.param))


class TestSlidingWindow:
    kind = MemoryKind.SLIDING_WINDOW

    def saved(self, engine: BareEngine, ids: list[int], *, slot: int = 0) -> SlotFile:
        engine.clear()
        engine.fill(ids, slot=slot)
        data = engine.save(slot)
        assert round_trip_ok(data, self.kind)
        return read(data, self.kind)

    def whole(self, source: SlotFile, **how: Any) -> bytes:
        end = len(source.tokens)
        return written(source, [part(source, 0, end)], boundary=source.boundary(), **how)

    @pytest.mark.parametrize("end", EXACT_ENDS)
    def test_a_mended_window_is_reused_whole_and_exactly(
        self, sliding: BareEngine, end: int
    ) -> None:
        ids, more = random_ids(7, end), random_ids(8, 6)
        found = self.saved(sliding, ids)
        warm = sliding.ask(ids + more, slot=0)
        assert warm.cache_tokens == end
        sliding.clear()
        sliding.restore(self.whole(found, streams=sliding.streams), slot=2)
        assert sliding.ask(ids + more, slot=2) == warm

    @pytest.mark.parametrize("end", OTHER_ENDS)
    def test_a_mended_window_is_reused_whole_at_any_end(
        self, sliding: BareEngine, end: int
    ) -> None:
        ids, more = random_ids(7, end), random_ids(8, 6)
        found = self.saved(sliding, ids)
        warm = sliding.ask(ids + more, slot=0, tokens=1)
        sliding.clear()
        sliding.restore(self.whole(found, streams=sliding.streams), slot=2)
        restored = sliding.ask(ids + more, slot=2, tokens=1)
        assert restored.cache_tokens == end
        assert_close(restored, warm)

    @pytest.mark.parametrize("end", FITTING_ENDS)
    def test_a_prefix_within_the_window_is_reused_but_for_a_token(
        self, sliding: BareEngine, end: int
    ) -> None:
        ids, more = random_ids(7, end), random_ids(8, 6)
        found = self.saved(sliding, ids)
        sliding.clear()
        sliding.restore(self.whole(found, streams=sliding.streams), slot=3)
        restored = sliding.ask(ids + more, slot=3, tokens=1)
        assert restored.cache_tokens == end - 1
        sliding.clear()
        assert_close(restored, sliding.ask(ids + more, slot=0, tokens=1))

    def test_without_the_mend_nothing_is_reused(self, sliding: BareEngine) -> None:
        for end in (40, 100):
            ids, more = random_ids(7, end), random_ids(8, 6)
            found = self.saved(sliding, ids)
            sliding.clear()
            sliding.restore(self.whole(found, streams=sliding.streams, mend=False), slot=1)
            assert sliding.ask(ids + more, slot=1).cache_tokens == 0

    def test_the_saved_tokens_alone_are_reused_but_for_the_last(self, sliding: BareEngine) -> None:
        ids = random_ids(7, 100)
        found = self.saved(sliding, ids)
        sliding.clear()
        sliding.restore(self.whole(found, streams=sliding.streams), slot=1)
        assert sliding.ask(ids, slot=1).cache_tokens == 99

    def test_a_prefix_shorter_by_more_is_prefilled_as_its_window_isnt_there(
        self, sliding: BareEngine
    ) -> None:
        ids = random_ids(7, 100)
        found = self.saved(sliding, ids)
        sliding.clear()
        sliding.restore(self.whole(found, streams=sliding.streams), slot=1)
        assert sliding.ask([*ids[:98], 7, 8, 9], slot=1).cache_tokens == 0

    def test_base_rows_of_a_longer_file_serve_an_earlier_end(self, sliding: BareEngine) -> None:
        ids, more = random_ids(7, 130), random_ids(8, 6)
        end = self.saved(sliding, ids)
        warm = sliding.ask(ids + more, slot=0)
        longer = read(sliding.save(0), self.kind)
        assert len(longer.tokens) > 130
        joined = written(
            end,
            [part(end, 0, 50), part(longer, 50, len(longer.tokens), take=130)],
            boundary=end.boundary(),
            streams=sliding.streams,
        )
        sliding.clear()
        sliding.restore(joined, slot=3)
        assert sliding.ask(ids + more, slot=3) == warm

    def test_the_window_ends_where_the_file_does(self, sliding: BareEngine) -> None:
        for end in (40, 200):
            found = self.saved(sliding, random_ids(9, end), slot=1)
            boundary = found.boundary()
            assert boundary is not None
            lo = max(0, end - TINY_WINDOW_TOKENS)
            assert window_range(found.layout, boundary) == (lo, end)

    def test_checkpoints_are_boundary_state_of_earlier_ends(self, sliding: BareEngine) -> None:
        """The engine keeps one before the last tokens; rows cut there make it restorable."""
        ids, more = random_ids(11, 198), random_ids(12, 6)
        found = self.saved(sliding, ids)
        warm = sliding.ask(ids[:194] + more, slot=0)
        assert warm.cache_tokens == 194
        checkpoint = next(c for c in found.checkpoints if c.end_tokens == 194)
        sliding.clear()
        sliding.restore(
            written(
                found,
                [part(found, 0, 194)],
                boundary=checkpoint.boundary,
                streams=sliding.streams,
            ),
            slot=2,
        )
        assert sliding.ask(ids[:194] + more, slot=2) == warm


def test_a_full_size_window_cache_is_restored_as_it_is(
    bare_engine: StartEngine, gemma3: Path
) -> None:
    engine = bare_engine(gemma3, swa_full=True)
    for end in (40, 100):
        ids, more = random_ids(7, end), random_ids(8, 6)
        engine.clear()
        engine.fill(ids, slot=0)
        data = engine.save(0)
        warm = engine.ask(ids + more, slot=0)
        assert round_trip_ok(data, MemoryKind.SLIDING_WINDOW)
        engine.clear()
        engine.restore(data, slot=2)
        restored = engine.ask(ids + more, slot=2)
        assert restored.cache_tokens == end
        assert restored == warm


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "lfm2.gguf"
    write_tiny_lfm2(path, small_model())
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def hybrid(request: pytest.FixtureRequest, bare_engine: StartEngine, lfm2: Path) -> BareEngine:
    return bare_engine(lfm2, **layout_params(request.param))


class TestHybrid:
    kind = MemoryKind.HYBRID

    def saved(self, engine: BareEngine, ids: list[int], *, slot: int = 0) -> bytes:
        engine.clear()
        engine.fill(ids, slot=slot)
        data = engine.save(slot)
        assert round_trip_ok(data, self.kind)
        return data

    @pytest.mark.parametrize("end", [1, 5, 40, 200])
    def test_an_end_is_reused_whole_and_exactly(self, hybrid: BareEngine, end: int) -> None:
        ids, more = random_ids(7, end), random_ids(8, 6)
        found = read(self.saved(hybrid, ids), self.kind)
        warm = hybrid.ask(ids + more, slot=0)
        boundary = found.boundary()
        assert boundary is not None
        assert boundary_end(found.layout, boundary) == end
        parts = [part(found, lo, hi) for lo, hi in pairwise(sorted({0, end // 2, end}))]
        hybrid.clear()
        hybrid.restore(written(found, parts, boundary=boundary, streams=hybrid.streams), slot=3)
        restored = hybrid.ask(ids + more, slot=3)
        assert restored == warm
        assert restored.cache_tokens == end

    def test_rows_of_a_longer_file_and_this_ends_state_are_this_ends_file(
        self, hybrid: BareEngine
    ) -> None:
        ids = random_ids(7, 60)
        data = self.saved(hybrid, ids)
        end = read(data, self.kind)
        hybrid.fill(ids + random_ids(8, 30), slot=0)
        longer = read(hybrid.save(0), self.kind)
        made = written(
            end,
            [part(longer, 0, 90, take=60)],
            boundary=end.boundary(),
            streams=hybrid.streams,
            appendix=end.appendix,
        )
        assert made == data

    def test_checkpoints_are_boundary_state_of_earlier_ends(self, hybrid: BareEngine) -> None:
        ids, more = random_ids(11, 104), random_ids(12, 6)
        found = read(self.saved(hybrid, ids), self.kind)
        warm = hybrid.ask(ids[:100] + more, slot=0)  # goes back to its own checkpoint
        assert warm.cache_tokens == 100
        checkpoint = next(c for c in found.checkpoints if c.end_tokens == 100)
        hybrid.clear()
        hybrid.restore(
            written(
                found,
                [part(found, 0, 104, take=100)],
                boundary=checkpoint.boundary,
                streams=hybrid.streams,
            ),
            slot=2,
        )
        assert hybrid.ask(ids[:100] + more, slot=2) == warm


def test_one_flipped_bit_of_the_state_is_heard(bare_engine: StartEngine, lfm2: Path) -> None:
    """The comparisons above can fail: what the engine answers hangs on the state it was given."""
    engine = bare_engine(lfm2)
    ids, more = random_ids(7, 40), random_ids(8, 6)
    engine.fill(ids, slot=0)
    data = bytearray(engine.save(0))
    warm = engine.ask(ids + more, slot=0)
    found = read(bytes(data), MemoryKind.HYBRID)
    boundary = found.boundary()
    assert boundary is not None
    (type_number,) = struct.unpack_from("<i", boundary, 20)
    assert type_number == 0  # f32
    at = bytes(data).index(boundary) + 32 + 3
    data[at] ^= 0x01  # the exponent of the first value
    engine.clear()
    engine.restore(bytes(data), slot=1)
    assert engine.ask(ids + more, slot=1) != warm
