"""Whether rows and states hold numbers: what was computed from NaN or infinity must never be kept.

Rows are elements, or blocks of a scale (two for some types) and small integers. Only where an
exponent has all bits set is a number none. ggml's numbers of types are its file format's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keepwarm.slotfile.layout import Buffer, TensorLayout

_CHUNK = 1 << 19  # elements looked at together: they stay in the CPU's cache


class _Floats(NamedTuple):
    """`per_block` floats of `dtype` at the beginning of each block of `block_bytes`."""

    dtype: str
    exponent: int
    per_block: int
    block_bytes: int


_TYPES = {
    0: _Floats("<u4", 0x7F80_0000, 1, 4),  # F32
    1: _Floats("<u2", 0x7C00, 1, 2),  # F16
    2: _Floats("<u2", 0x7C00, 1, 18),  # Q4_0
    3: _Floats("<u2", 0x7C00, 2, 20),  # Q4_1
    6: _Floats("<u2", 0x7C00, 1, 22),  # Q5_0
    7: _Floats("<u2", 0x7C00, 2, 24),  # Q5_1
    8: _Floats("<u2", 0x7C00, 1, 34),  # Q8_0
    20: _Floats("<u2", 0x7C00, 1, 18),  # IQ4_NL
    30: _Floats("<u2", 0x7F80, 1, 2),  # BF16
}


def rows_are_finite(tensors: Sequence[TensorLayout], buffers: Sequence[Buffer]) -> bool:
    """Whether all rows of an extent's payload, one buffer a tensor, are finite numbers.

    Types that aren't known are taken for finite.
    """
    return all(
        _is_finite(floats, buffer)
        for tensor, buffer in zip(tensors, buffers, strict=True)
        if (floats := _TYPES.get(tensor.type)) is not None
    )


def _is_finite(floats: _Floats, buffer: Buffer) -> bool:
    data = np.frombuffer(buffer, np.uint8)
    if data.size % floats.block_bytes:
        return True  # not laid out as this type is
    width = np.dtype(floats.dtype).itemsize * floats.per_block
    if width == floats.block_bytes:
        numbers = data.view(floats.dtype)
    else:
        blocks = data.reshape(-1, floats.block_bytes)[:, :width]
        numbers = np.ascontiguousarray(blocks).reshape(-1).view(floats.dtype)
    mask = numbers.dtype.type(floats.exponent)
    for begin in range(0, numbers.size, _CHUNK):
        if np.bitwise_and(numbers[begin : begin + _CHUNK], mask).max() == mask:
            return False
    return True
