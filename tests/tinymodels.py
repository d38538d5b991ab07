"""Models for tests: the real small one, and random-weight ones of the memory kinds it hasn't.

The random ones talk nonsense, but their arithmetic is real: what they answer depends on every bit
of their KV state, which is all that a restored slot must show.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_CONTEXT_TOKENS = 4096
TINY_WINDOW_TOKENS = 64
SEED = 20260101
TINY_LAYERS = 6  # the sixth layer of a Gemma 3 is its first that sees everything
EMBEDDING = 64
FEED_FORWARD = 128
HEADS = 2
HEAD_ELEMENTS = 32  # quantized KV comes in blocks of 32
CONV_TOKENS = 3  # LFM2's short convolution
UNUSED_TOKEN = 3  # and the next ones: names of files and repositories, which no test writes
LFM2_KV_HEADS = (0, 0, 1, 0, 0, 1)  # 0: a convolution layer


def small_model() -> Path:
    """The real small model; the test is skipped where it isn't there."""
    named = os.environ.get("KEEPWARM_TEST_MODEL")
    path = Path(named) if named else Path(__file__).parents[1] / ".cache" / "models" / MODEL_NAME
    if not path.is_file():
        pytest.skip(f"no model at {path}; KEEPWARM_TEST_MODEL names another")
    return path


def write_tiny_qwen3(
    path: Path,
    source_gguf: Path,
    *,
    seed: int = SEED,
    context_tokens: int = TINY_CONTEXT_TOKENS,
) -> None:
    """A model of plain attention (6 layers), about 9 MB: as fast as a test could wish.

    It has the tokens of an infill, which the real small one lacks.

    `source_gguf` gives the tokenizer. The same bytes each time, and other weights for another seed.
    """
    made = _Model(path, "qwen3", source_gguf, seed, context_tokens)
    writer = made.writer
    writer.add_key_length(HEAD_ELEMENTS)
    writer.add_value_length(HEAD_ELEMENTS)
    writer.add_head_count_kv(1)
    for number, name in enumerate(("pre", "suf", "mid")):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", UNUSED_TOKEN + number)
    made.norm("output_norm.weight")
    for layer in range(TINY_LAYERS):
        made.norm(f"blk.{layer}.attn_norm.weight")
        made.norm(f"blk.{layer}.ffn_norm.weight")
        made.attention(layer)
        made.feed_forward(layer)
    made.finish()


def write_tiny_qwen3vl(path: Path, source_gguf: Path, *, seed: int = SEED) -> None:
    """As `write_tiny_qwen3`, with positions of several parts (M-RoPE), as models of pictures have.

    `source_gguf` gives the tokenizer. The same bytes each time, and other weights for another seed.
    """
    made = _Model(path, "qwen3vl", source_gguf, seed)
    writer = made.writer
    writer.add_key_length(HEAD_ELEMENTS)
    writer.add_value_length(HEAD_ELEMENTS)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_sections([4, 6, 6, 0])
    made.norm("output_norm.weight")
    for layer in range(TINY_LAYERS):
        made.norm(f"blk.{layer}.attn_norm.weight")
        made.norm(f"blk.{layer}.ffn_norm.weight")
        made.attention(layer)
        made.feed_forward(layer)
    made.finish()


def write_tiny_gemma3(
    path: Path,
    source_gguf: Path,
    *,
    seed: int = SEED,
    context_tokens: int = TINY_CONTEXT_TOKENS,
) -> None:
    """A sliding-window model (window 64, 6 layers, one of them full), about 9 MB.

    `source_gguf` gives the tokenizer. The same bytes each time, and other weights for another seed.
    """
    made = _Model(path, "gemma3", source_gguf, seed, context_tokens)
    writer = made.writer
    writer.add_key_length(HEAD_ELEMENTS)
    writer.add_value_length(HEAD_ELEMENTS)
    writer.add_head_count_kv(1)
    writer.add_sliding_window(TINY_WINDOW_TOKENS)
    made.norm("output_norm.weight")
    for layer in range(TINY_LAYERS):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            made.norm(f"blk.{layer}.{name}.weight")
        made.attention(layer)
        made.feed_forward(layer)
    made.finish()


def write_tiny_lfm2(
    path: Path,
    source_gguf: Path,
    *,
    seed: int = SEED,
    context_tokens: int = TINY_CONTEXT_TOKENS,
) -> None:
    """A hybrid model (4 convolution layers, 2 attention layers), about 9 MB.

    `source_gguf` gives the tokenizer. The same bytes each time, and other weights for another seed.
    """
    made = _Model(path, "lfm2", source_gguf, seed, context_tokens)
    writer = made.writer
    writer.add_head_count_kv(list(LFM2_KV_HEADS))
    writer.add_shortconv_l_cache(CONV_TOKENS)
    writer.add_vocab_size(made.vocabulary)
    made.norm("token_embd_norm.weight")
    for layer, kv_heads in enumerate(LFM2_KV_HEADS):
        made.norm(f"blk.{layer}.attn_norm.weight")
        made.norm(f"blk.{layer}.ffn_norm.weight")
        made.feed_forward(layer)
        if kv_heads:
            made.attention(layer)
        else:
            made.matrix(f"blk.{layer}.shortconv.conv.weight", EMBEDDING, CONV_TOKENS, np.float32)
            made.matrix(f"blk.{layer}.shortconv.in_proj.weight", 3 * EMBEDDING, EMBEDDING)
            made.matrix(f"blk.{layer}.shortconv.out_proj.weight", EMBEDDING, EMBEDDING)
    made.finish()


class _Model:
    """A GGUF file being written, with random weights from a seed."""

    def __init__(
        self,
        path: Path,
        arch: str,
        source_gguf: Path,
        seed: int,
        context_tokens: int = TINY_CONTEXT_TOKENS,
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.writer = gguf.GGUFWriter(path, arch)
        writer = self.writer
        writer.add_name(f"tiny random {arch}")
        writer.add_context_length(context_tokens)
        writer.add_embedding_length(EMBEDDING)
        writer.add_block_count(TINY_LAYERS)
        writer.add_feed_forward_length(FEED_FORWARD)
        writer.add_head_count(HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10_000.0)
        self.vocabulary = self._copy_tokenizer(source_gguf)
        self.matrix("token_embd.weight", self.vocabulary, EMBEDDING)

    def _copy_tokenizer(self, source_gguf: Path) -> int:
        fields = gguf.GGUFReader(source_gguf).fields
        for name, field in fields.items():
            if not name.startswith("tokenizer."):
                continue
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            self.writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
        return len(fields["tokenizer.ggml.tokens"].data)

    def matrix(self, name: str, rows: int, columns: int, dtype: type = np.float16) -> None:
        values = self.random.standard_normal((rows, columns), np.float32) / np.sqrt(columns)
        self.writer.add_tensor(name, values.astype(dtype))

    def norm(self, name: str, elements: int = EMBEDDING) -> None:
        spread = self.random.standard_normal(elements, np.float32)
        self.writer.add_tensor(name, 1 + spread / np.float32(8))

    def attention(self, layer: int) -> None:
        queries = HEADS * HEAD_ELEMENTS
        self.norm(f"blk.{layer}.attn_q_norm.weight", HEAD_ELEMENTS)
        self.norm(f"blk.{layer}.attn_k_norm.weight", HEAD_ELEMENTS)
        self.matrix(f"blk.{layer}.attn_q.weight", queries, EMBEDDING)
        self.matrix(f"blk.{layer}.attn_k.weight", HEAD_ELEMENTS, EMBEDDING)
        self.matrix(f"blk.{layer}.attn_v.weight", HEAD_ELEMENTS, EMBEDDING)
        self.matrix(f"blk.{layer}.attn_output.weight", EMBEDDING, queries)

    def feed_forward(self, layer: int) -> None:
        self.matrix(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, EMBEDDING)
        self.matrix(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, EMBEDDING)
        self.matrix(f"blk.{layer}.ffn_down.weight", EMBEDDING, FEED_FORWARD)

    def finish(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
