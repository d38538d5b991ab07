"""A projector with random weights: what lets a tiny model of `tinymodels` see pictures.

What it makes of a picture is as meaningless as what the models say, but it depends on every pixel.
"""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np

from tinymodels import EMBEDDING, FEED_FORWARD, HEADS, SEED

IMAGE_PIXELS = 112  # a side; pictures are scaled to it
PATCH_PIXELS = 14
POOLED_PATCHES = 2  # a side of what becomes one token
PICTURE_TOKENS = (IMAGE_PIXELS // PATCH_PIXELS // POOLED_PATCHES) ** 2


def write_tiny_projector(path: Path, *, seed: int = SEED) -> None:
    """A vision encoder of one block in Gemma 3's form, about 300 kB. The same bytes each time."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name("tiny random projector")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_image_size(IMAGE_PIXELS)
    writer.add_vision_patch_size(PATCH_PIXELS)
    writer.add_vision_embedding_length(EMBEDDING)
    writer.add_vision_feed_forward_length(FEED_FORWARD)
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_projection_dim(EMBEDDING)
    writer.add_vision_projector_scale_factor(POOLED_PATCHES)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_gelu(True)

    def tensor(name: str, *shape: int, dtype: type = np.float32) -> None:
        spread = np.sqrt(shape[-1]) if len(shape) > 1 else 8
        values = random.standard_normal(shape, np.float32) / np.float32(spread)
        is_norm = len(shape) == 1 and name.endswith("weight")
        writer.add_tensor(name, (values + is_norm).astype(dtype))

    patches = (IMAGE_PIXELS // PATCH_PIXELS) ** 2
    tensor("v.patch_embd.weight", EMBEDDING, 3, PATCH_PIXELS, PATCH_PIXELS)
    tensor("v.patch_embd.bias", EMBEDDING)
    tensor("v.position_embd.weight", patches, EMBEDDING)
    for name in ("v.blk.0.ln1", "v.blk.0.ln2", "v.post_ln"):
        tensor(f"{name}.weight", EMBEDDING)
        tensor(f"{name}.bias", EMBEDDING)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        tensor(f"v.blk.0.{name}.weight", EMBEDDING, EMBEDDING)
        tensor(f"v.blk.0.{name}.bias", EMBEDDING)
    tensor("v.blk.0.ffn_up.weight", FEED_FORWARD, EMBEDDING)
    tensor("v.blk.0.ffn_up.bias", FEED_FORWARD)
    tensor("v.blk.0.ffn_down.weight", EMBEDDING, FEED_FORWARD)
    tensor("v.blk.0.ffn_down.bias", EMBEDDING)
    tensor("mm.input_projection.weight", EMBEDDING, EMBEDDING)
    tensor("mm.soft_emb_norm.weight", EMBEDDING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def png(seed: int, *, pixels: int = 32) -> bytes:
    """A PNG of random pixels: one a seed."""
    rows = np.random.default_rng(seed).integers(0, 256, (pixels, pixels * 3), np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">2I5B", pixels, pixels, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_base64(seed: int) -> str:
    """The same as text."""
    return base64.b64encode(png(seed)).decode()


def picture(seed: int) -> dict[str, object]:
    """A part of a chat message: a picture of random pixels."""
    url = f"data:image/png;base64,{png_base64(seed)}"
    return {"type": "image_url", "image_url": {"url": url}}
