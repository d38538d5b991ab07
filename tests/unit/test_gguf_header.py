"""What a model's header tells, and files that are none or not whole."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from keepwarm.core.memory import MemoryKind
from keepwarm.engine import gguf_header
from keepwarm.engine.gguf_header import TENSOR_TYPES, read_model
from keepwarm.errors import ModelError


def write(path: Path, *, arch: str = "llama", seed: int = 1, **fields: Any) -> Path:
    """A small model file with these further fields."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("a small one")
    writer.add_context_length(4096)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(500)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(5000)])
    for name, value in fields.items():
        key = name.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    random = np.random.default_rng(seed)
    for number in range(3):
        tensor = random.standard_normal((64, 256)).astype(np.float32)
        writer.add_tensor(f"blk.{number}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_tells_what_the_model_is(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    header = read_model(path)
    assert header.name == "a small one"
    assert header.architecture == "llama"
    assert header.train_context_tokens == 4096
    assert header.chat_template == "{{ messages }}"
    assert header.size_bytes == path.stat().st_size
    assert header.memory is MemoryKind.PLAIN


@pytest.mark.parametrize(
    ("arch", "fields", "memory"),
    [
        ("llama", {}, MemoryKind.PLAIN),
        ("gemma3", {"gemma3__attention__sliding_window": 512}, MemoryKind.SLIDING_WINDOW),
        ("gemma3", {"gemma3__attention__sliding_window": 0}, MemoryKind.PLAIN),
        ("lfm2", {"lfm2__shortconv__l_cache": 3}, MemoryKind.HYBRID),
        ("mamba", {"mamba__ssm__state_size": 16}, MemoryKind.HYBRID),
        (
            "qwen3next",
            {"qwen3next__ssm__state_size": 16, "qwen3next__attention__sliding_window": 64},
            MemoryKind.HYBRID,
        ),
    ],
)
def test_the_memory_type_follows_from_the_header(
    tmp_path: Path, arch: str, fields: dict[str, int], memory: MemoryKind
) -> None:
    header = read_model(write(tmp_path / "m.gguf", arch=arch, **fields))
    assert header.memory is memory
    if memory is MemoryKind.SLIDING_WINDOW:
        assert header.window_tokens == 512


def test_two_fine_tunes_of_one_shape_differ(tmp_path: Path) -> None:
    first = read_model(write(tmp_path / "a.gguf", seed=1))
    second = read_model(write(tmp_path / "b.gguf", seed=2))
    assert first.size_bytes == second.size_bytes
    assert first.file_id != second.file_id


def test_one_model_is_the_same_under_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    before = read_model(path).file_id
    moved = path.rename(tmp_path / "b.gguf")
    assert read_model(moved).file_id == before


def test_a_file_that_was_overwritten_in_place_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", seed=1)
    before = read_model(path).file_id
    raw = write(tmp_path / "other.gguf", seed=2).read_bytes()
    path.write_bytes(raw)
    assert read_model(path).file_id != before


def test_a_model_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError) as caught:
            read_model(cut)
        assert "cut.gguf" in str(caught.value)


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 10**9])
def test_a_header_that_claims_too_much_is_refused_and_nothing_is_allocated(
    tmp_path: Path, claim: int
) -> None:
    whole = bytearray(write(tmp_path / "m.gguf").read_bytes())
    for offset in (8, 16, 24):  # tensors, pairs, the first key's length
        damaged = bytearray(whole)
        struct.pack_into("<Q", damaged, offset, claim)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        with pytest.raises(ModelError):
            read_model(path)


def test_random_damage_to_the_header_is_an_error_or_nothing(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    random = np.random.default_rng(3)
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(4, 600, 3):
            damaged[place] = int(random.integers(0, 256))
        path.write_bytes(damaged)
        try:
            read_model(path)
        except ModelError:
            continue


def test_a_model_that_isnt_there_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--model"):
        read_model(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="no header"):
        read_model(tmp_path)


def test_the_sizes_of_tensor_types_are_ggmls_own() -> None:
    for kind, (block, block_bytes) in GGML_QUANT_SIZES.items():
        if int(kind) in TENSOR_TYPES:
            assert TENSOR_TYPES[int(kind)] == (block, block_bytes), kind
    common = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4")
    assert {int(GGMLQuantizationType[name]) for name in common} <= set(TENSOR_TYPES)


def test_a_header_that_is_longer_than_what_is_read_at_first_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")
    whole = read_model(path)
    for first in (64, 4096, path.stat().st_size):
        gguf_header._read.cache_clear()
        monkeypatch.setattr(gguf_header, "_HEADER_BYTES", first)
        assert read_model(path) == whole
