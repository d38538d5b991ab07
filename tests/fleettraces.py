"""A small made-up request trace in Mooncake's format: conversations with one preamble."""

from __future__ import annotations

import json
import random

BLOCK = 512


def lines(
    *,
    conversations: int = 60,
    turns: int = 6,
    seed: int = 7,
    gap_s: float = 20.0,
    every_s: float = 2.0,
) -> list[str]:
    """Requests of conversations that begin `every_s` apart and go on every `gap_s` or so.

    All share their first block; each turn keeps all whole blocks of the turn before it.
    """
    draw = random.Random(seed)
    count = 1
    requests = []
    for number in range(conversations):
        ids = [0]
        length = BLOCK
        at_s = number * every_s
        for _ in range(draw.randint(1, turns)):
            ids = ids[: length // BLOCK]
            length += draw.randint(200, 4000)
            while len(ids) < -(-length // BLOCK):
                ids.append(count)
                count += 1
            requests.append(
                {
                    "timestamp": round(at_s * 1e3),
                    "input_length": length,
                    "output_length": draw.randint(1, 300),
                    "hash_ids": list(ids),
                }
            )
            at_s += gap_s * draw.uniform(0.5, 1.5)
    requests.sort(key=lambda r: r["timestamp"])
    return [json.dumps(r) for r in requests]
