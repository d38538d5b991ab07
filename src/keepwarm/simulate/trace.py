"""Request traces in Mooncake's format: one JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` is in milliseconds. `hash_ids` has one number for each block of `BLOCK_TOKENS` tokens
of the prompt, the last block may be shorter; equal numbers mean equal tokens up to the block's end
(github.com/kvcache-ai/Mooncake, the FAST'25 release). What a reply adds to the cache isn't in a
trace: it shows as new blocks of the conversation's next request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from keepwarm.errors import ConfigError

BLOCK_TOKENS = 512

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: _Count
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `blocks` are numbers of prefixes, shortest first; `ends_tokens` where each ends.

    A number stands for the block and all before it, so two requests that have one in common have
    everything up to it in common.
    """

    at_s: float
    prompt_tokens: int
    reply_tokens: int
    blocks: tuple[int, ...]
    ends_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time. `block_parent[b]` is the block before b, -1 for a first one."""

    requests: tuple[Request, ...]
    block_parent: tuple[int, ...]
    block_tokens: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def duration_s(self) -> float:
        """From the first request's arrival to the last one's."""
        return self.requests[-1].at_s - self.requests[0].at_s if self.requests else 0.0

    def sped_up(self, factor: float) -> Trace:
        """The same requests, `factor` times as many a second."""
        faster = tuple(
            Request(r.at_s / factor, r.prompt_tokens, r.reply_tokens, r.blocks, r.ends_tokens)
            for r in self.requests
        )
        return Trace(faster, self.block_parent, self.block_tokens)


def read_trace(
    lines: Iterable[bytes | str], *, block_tokens: int = BLOCK_TOKENS, most: int | None = None
) -> Trace:
    """Read a trace, or its first `most` requests. Empty lines are skipped.

    Raises: ConfigError naming the line that isn't as the format says.
    """
    decode = msgspec.json.Decoder(_Line).decode
    numbers: dict[tuple[int, int, int], int] = {}
    parents: list[int] = []
    sizes: list[int] = []
    requests: list[Request] = []
    for number, line in enumerate(lines, 1):
        if most is not None and len(requests) >= most:
            break
        if not line.strip():
            continue
        try:
            read = decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"line {number} of the trace: {error}") from error
        if len(read.hash_ids) != -(-read.input_length // block_tokens):
            raise ConfigError(
                f"line {number} of the trace: {read.input_length} tokens are not "
                f"{len(read.hash_ids)} blocks of {block_tokens}. Is --block-tokens right?"
            )
        blocks: list[int] = []
        ends: list[int] = []
        before, start = -1, 0
        for name in read.hash_ids:
            end = min(start + block_tokens, read.input_length)
            # Numbered by what stands before, too: some traces number blocks by content alone.
            block = numbers.setdefault((before, name, end - start), len(parents))
            if block == len(parents):
                parents.append(before)
                sizes.append(end - start)
            blocks.append(block)
            ends.append(end)
            before, start = block, end
        requests.append(
            Request(
                read.timestamp / 1e3,
                read.input_length,
                read.output_length,
                tuple(blocks),
                tuple(ends),
            )
        )
    if not requests:
        raise ConfigError("The trace has no requests.")
    requests.sort(key=lambda request: request.at_s)
    return Trace(tuple(requests), tuple(parents), tuple(sizes))
