"""Read what Keepwarm needs from a GGUF file's header, and identify the file.

The `gguf` package builds an object for every vocabulary entry (2.8 s for 49,000 tokens, measured),
which is longer than the engine takes to load the model; this walks over the arrays instead. Format:
magic `GGUF`, u32 version, u64 tensors, u64 pairs, then pairs of key, u32 type, value; strings are
u64 length and bytes; then for each tensor its name, u32 dimensions, u64 each, u32 type, u64 offset
into the data, which begins at the next multiple of `general.alignment`; all little-endian. See
docs/decisions/0002-gguf-header.md.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from keepwarm.core.memory import MemoryKind
from keepwarm.errors import ModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Only short arrays (one value a layer) are kept; vocabularies and merges are walked over.
_KEPT_ARRAY = 4096
_SAMPLE_BYTES, _SAMPLES = 64 * 1024, 64
# Read at first, and at most: a vocabulary of 150,000 with its merges takes some 6 MB.
_HEADER_BYTES, _MOST_BYTES = 8 << 20, 256 << 20
# ggml's types by number: elements in a block, and a block's bytes. Of a type that isn't here, only
# the beginning of its tensors is looked for.
# fmt: off
TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36),
    41: (128, 18),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """What a model file says of itself.

    `window_tokens` is the sliding window, 0 where there is none; `train_context_tokens` what the
    model was trained for; `layers` how many it has; `row_bytes` what one token's keys and values
    take at most as f16 (0 where the header doesn't tell); `file_id` a hash of size, header and
    sampled blocks, so that two fine-tunes of one shape differ; `rope_switch_tokens` is the context
    of a slot beyond which the engine rotates by the model's long factors instead of its short ones,
    0 where there are none.
    """

    path: Path
    name: str
    architecture: str
    memory: MemoryKind
    window_tokens: int
    train_context_tokens: int
    chat_template: str
    size_bytes: int
    file_id: str
    layers: int = 0
    row_bytes: int = 0
    rope_switch_tokens: int = 0


def read_model(path: Path) -> ModelHeader:
    """Read a GGUF model's header.

    Raises:
        ModelError: the file is missing, not GGUF, or shorter than its header says.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(
            f"The model file {path} can't be read ({error.strerror}). Give the path of a GGUF "
            "file with --model."
        ) from error
    return _read(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, _inode: int, _mtime_ns: int, size: int) -> ModelHeader:
    """Cached by inode, time and size: a renamed model is the same, an overwritten one isn't."""
    if path.is_dir() or size < 24:
        raise ModelError(f"{path} is not a GGUF model: it has no header. Give a .gguf file.")
    # Read, not mapped: a model that somebody replaces meanwhile is an error, not the process's end.
    with path.open("rb", buffering=0) as file:
        data = file.read(_HEADER_BYTES)
        if data[:4] != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF model (it begins with {data[:4]!r}). llama.cpp runs GGUF "
                "files only; convert the model or give another file."
            )
        while True:
            try:
                fields, end = _fields(data)
                needed = _needed_bytes(data, end, int(fields.get("general.alignment") or 32))
                break
            except (struct.error, IndexError, KeyError, OverflowError, ValueError) as error:
                is_short = isinstance(error, struct.error | IndexError)
                more = is_short and len(data) < _MOST_BYTES and file.read(len(data))
                if not more:
                    raise ModelError(
                        f"{path} is truncated or damaged: its header can't be read ({error}). "
                        "Fetch the file again and compare its size with the source."
                    ) from error
                data += more
        if needed > size:
            raise ModelError(
                f"{path} is truncated: its tensors need {needed:,} bytes, and it has {size:,}. "
                "Fetch the file again and compare its size with the source."
            )
        file_id = _file_id(file.fileno(), data[:end], size)
    return _header(path, fields, size, file_id)


def _fields(data: bytes) -> tuple[dict[str, Any], int]:
    version, _tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise KeyError(f"GGUF version {version}")
    offset = 24
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        key, offset = _string(data, offset)
        (kind,) = struct.unpack_from("<I", data, offset)
        fields[key], offset = _value(data, offset + 4, kind)
    if offset > len(data):
        raise IndexError("the header goes beyond the end of the file")
    return fields, offset


def _needed_bytes(data: bytes, offset: int, alignment: int) -> int:
    """How long the file must be for all of its tensors to be there."""
    (count,) = struct.unpack_from("<Q", data, 8)
    end = 0
    for _ in range(count):
        _, offset = _string(data, offset)
        (dimensions,) = struct.unpack_from("<I", data, offset)
        shape = struct.unpack_from(f"<{dimensions}Q", data, offset + 4)
        kind, at = struct.unpack_from("<IQ", data, offset + 4 + 8 * dimensions)
        offset += 16 + 8 * dimensions
        block, block_bytes = TENSOR_TYPES.get(kind, (1, 0))
        end = max(end, at + math.prod(shape) // block * block_bytes)
    start = -(-offset // alignment) * alignment
    return start + end if count else offset


def _string(data: bytes, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    if end > len(data):
        raise IndexError("a string goes beyond the end of the file")
    return data[offset + 8 : end].decode("utf-8", "replace"), end


def _value(data: bytes, offset: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, offset)
    if kind != _ARRAY:
        code = "<" + _SCALARS[kind]
        return struct.unpack_from(code, data, offset)[0], offset + struct.calcsize(code)
    item, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if item == _STRING:
        for _ in range(count):
            offset += 8 + struct.unpack_from("<Q", data, offset)[0]
        return None, offset
    width = struct.calcsize("<" + _SCALARS[item])
    if offset + width * count > len(data):
        raise IndexError("an array goes beyond the end of the file")
    kept = None
    if count <= _KEPT_ARRAY:
        kept = list(struct.unpack_from(f"<{count}{_SCALARS[item]}", data, offset))
    return kept, offset + width * count


def _file_id(fd: int, header: bytes, size: int) -> str:
    h = xxhash.xxh3_128(size.to_bytes(8, "little"))
    h.update(header)
    body = max(size - len(header) - _SAMPLE_BYTES, 0)
    for i in range(_SAMPLES + 1):
        h.update(os.pread(fd, _SAMPLE_BYTES, len(header) + body * i // _SAMPLES))
    return h.hexdigest()


def _header(path: Path, fields: dict[str, Any], size: int, file_id: str) -> ModelHeader:
    arch = str(fields.get("general.architecture", ""))
    if not arch:
        raise ModelError(f"{path} names no architecture: it is not a language model's GGUF file.")
    window = fields.get(f"{arch}.attention.sliding_window") or 0
    recurrent = any(
        key.startswith((f"{arch}.ssm.", f"{arch}.shortconv.", f"{arch}.wkv", f"{arch}.time_mix"))
        for key in fields
    )
    memory = MemoryKind.PLAIN
    if recurrent:
        memory = MemoryKind.HYBRID
    elif window:
        memory = MemoryKind.SLIDING_WINDOW
    return ModelHeader(
        path=path,
        name=str(fields.get("general.name") or path.stem),
        architecture=arch,
        memory=memory,
        window_tokens=int(window),
        train_context_tokens=int(fields.get(f"{arch}.context_length") or 0),
        chat_template=str(fields.get("tokenizer.chat_template") or ""),
        size_bytes=size,
        file_id=file_id,
        layers=int(fields.get(f"{arch}.block_count") or 0),
        row_bytes=_row_bytes(arch, fields),
        rope_switch_tokens=_rope_switch(fields, arch),
    )


def _row_bytes(arch: str, fields: dict[str, Any]) -> int:
    """Keys and values of one token in every layer, two bytes an element."""
    layers = int(fields.get(f"{arch}.block_count") or 0)
    heads = fields.get(f"{arch}.attention.head_count") or 0
    each = fields.get(f"{arch}.attention.head_count_kv") or heads
    kv_heads = sum(each) if isinstance(each, list) else layers * int(each)
    most_heads = max(heads, default=0) if isinstance(heads, list) else int(heads)
    embedding = int(fields.get(f"{arch}.embedding_length") or 0)
    usual = embedding // most_heads if most_heads else 0
    keys = int(fields.get(f"{arch}.attention.key_length") or usual)
    values = int(fields.get(f"{arch}.attention.value_length") or usual)
    return kv_heads * (keys + values) * 2


def _rope_switch(fields: dict[str, Any], arch: str) -> int:
    """llama.cpp's `get_rope_factors`: long ones if a slot's context is larger than the original.

    Other kinds of scaling don't depend on the context that is asked for.
    """
    kind = str(fields.get(f"{arch}.rope.scaling.type") or "longrope")
    original = fields.get(f"{arch}.rope.scaling.original_context_length") or 0
    return int(original) if kind in ("longrope", "none") else 0
