"""What things cost here, learned while running: the numbers behind every plan.

Each figure is an exponentially weighted mean, so that a plan follows the machine when it slows down
(thermal limits, a neighbour), and forgets within about ten observations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# llama.cpp's attention on CPUs works on tiles of 64 queries, and goes one by one over fewer: behind
# 2,083 tokens (SmolLM2-135M, two cores) 48 took 485 ms and 64 took 395. So the first tokens of a
# prefill have a rate of their own.
_SHORT_TOKENS = 64
# A prefill of so many is long; what lies between teaches nothing.
_LONG_TOKENS = 128
# Fewer measure the pass of the engine's loop.
_LEAST_TOKENS = 4
# Decoding behind 241, 2,083 and 3,633 tokens: 63, 46 and 31 tokens a second (SmolLM2-135M, two
# cores, docs/benchmark.md): a token costs twice as much behind some four thousand as behind none.
_DECODE_S = 0.0145
_DECODE_DOUBLES_TOKENS = 4000.0
# A count of fewer characters measures its round trips.
_COUNTED_CHARS = 2000
# Weight of a new observation. 0.2 forgets nine tenths of the past in ten observations.
_ALPHA = 0.2


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean that starts from a prior and drops it at once when taught."""

    value: float
    seen: int = 0

    def learn(self, sample: float) -> None:
        """Take one observation into the mean."""
        self.value = sample if not self.seen else self.value + _ALPHA * (sample - self.value)
        self.seen += 1


@dataclass(slots=True)
class DecodeCost:
    """What a token of a reply costs by how many tokens it looks back at.

    A mean for each doubling of that number. Where nothing has been seen, the nearest one is taken
    and stretched by `_decode_growth`, which is also the shape of the prior.
    """

    _means: dict[int, tuple[Mean, Mean]] = field(default_factory=dict)

    def observe(self, *, context_tokens: float, tokens: int, seconds: float) -> None:
        """Learn from a reply's own count; a few tokens measure the engine's loop instead."""
        if tokens < _LEAST_TOKENS or seconds <= 0:
            return
        place, cost = self._means.setdefault(_doubling(context_tokens), (Mean(0.0), Mean(0.0)))
        place.learn(context_tokens)
        cost.learn(seconds / tokens)

    def at(self, context_tokens: float) -> float:
        """Seconds a token behind so many others."""
        growth = _decode_growth(context_tokens)
        if not self._means:
            return _DECODE_S * growth
        wanted = _doubling(context_tokens)
        place, cost = self._means[min(self._means, key=lambda seen: (abs(seen - wanted), seen))]
        return cost.value * growth / _decode_growth(place.value)


def _doubling(tokens: float) -> int:
    return int(tokens).bit_length()


def _decode_growth(context_tokens: float) -> float:
    return 1.0 + context_tokens / _DECODE_DOUBLES_TOKENS


@dataclass(slots=True)
class Rates:
    """Costs of prefill, save and restore on this machine with this model.

    The priors are those of a slow CPU (two cores, a 135M model: 4.6 ms a token, 2 GB/s through
    /dev/shm), so that before anything was measured Keepwarm errs towards saving.
    """

    prefill_s_per_token: Mean = field(default_factory=lambda: Mean(0.005))
    short_prefill_s_per_token: Mean = field(default_factory=lambda: Mean(0.005))
    decode_s_per_token: Mean = field(default_factory=lambda: Mean(0.02))
    decode_cost: DecodeCost = field(default_factory=DecodeCost)
    restore_s_per_byte: Mean = field(default_factory=lambda: Mean(0.5e-9))
    save_s_per_byte: Mean = field(default_factory=lambda: Mean(0.7e-9))
    assemble_s_per_byte: Mean = field(default_factory=lambda: Mean(0.7e-9))
    tokens_per_char: Mean = field(default_factory=lambda: Mean(0.26))
    # Rendering and tokenising over HTTP: 9 ms a thousand tokens on a slow two-core machine.
    count_s_per_char: Mean = field(default_factory=lambda: Mean(2.4e-6))
    # A save or restore costs a round trip and a pass of the engine's loop even when it is empty.
    call_s: float = 0.002

    def prefill_s(self, tokens: float) -> float:
        """Seconds to prefill so many tokens."""
        long = self.prefill_s_per_token
        short = self.short_prefill_s_per_token if self.short_prefill_s_per_token.seen else long
        first = min(max(tokens, 0.0), _SHORT_TOKENS)
        return first * short.value + max(tokens - _SHORT_TOKENS, 0.0) * long.value

    def restore_s(self, size_bytes: float, *, ready: bool) -> float:
        """Seconds until a snapshot of this size is in a slot; `ready` if no assembly is needed."""
        per_byte = self.restore_s_per_byte.value
        if not ready:
            per_byte += self.assemble_s_per_byte.value
        return self.call_s + size_bytes * per_byte

    def save_s(self, size_bytes: float) -> float:
        """Seconds during which a save keeps the engine's loop busy."""
        return self.call_s + size_bytes * self.save_s_per_byte.value

    def count_s(self, chars: float) -> float:
        """Seconds to render and tokenise a prompt of so many characters."""
        return self.call_s + chars * self.count_s_per_char.value

    def observe_count(self, *, chars: int, seconds: float) -> None:
        """Learn what counting costs; short prompts measure the round trip instead."""
        if chars >= _COUNTED_CHARS:
            self.count_s_per_char.learn(max(seconds - self.call_s, 1e-6) / chars)

    def observe_prefill(self, *, tokens: int, seconds: float) -> None:
        """Learn from a reply's own count."""
        if seconds <= 0:
            return
        if tokens >= _LONG_TOKENS:
            self.prefill_s_per_token.learn(seconds / tokens)
        elif _LEAST_TOKENS <= tokens < _SHORT_TOKENS:
            self.short_prefill_s_per_token.learn(seconds / tokens)

    def observe_bytes(self, mean: Mean, *, size_bytes: int, seconds: float) -> None:
        """Learn a bandwidth; small files measure the round trip instead."""
        if size_bytes >= 1_000_000:
            mean.learn(max(seconds - self.call_s, 1e-5) / size_bytes)
