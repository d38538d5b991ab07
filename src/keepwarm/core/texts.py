"""How far two texts are alike, by halving: comparing slices is as fast as memory."""

from __future__ import annotations


def common_chars(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    n = min(len(first), len(second))
    if first[:n] == second[:n]:
        return n
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def common_tail_chars(first: str, second: str) -> int:
    """How many characters two texts end with alike."""
    n = min(len(first), len(second))
    low, high = 0, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        if first[len(first) - middle :] == second[len(second) - middle :]:
            low = middle
        else:
            high = middle
    return low
