"""The last prompts of each namespace, so that a new one can be compared with what it resembles.

Theory of operation. A prompt is found by its marks: the deepest mark that a remembered prompt has
too says how far they are alike, and among those that have it, the one with most in common is the
nearest. A prompt that shares no mark (a date in its first line) is compared with the last few.
Prompts of a namespace are compared with that namespace's and with the tiers', which are everyone's,
never with another's: what differs is shown to whoever sent the later one.

Bounds: so many prompts a namespace, so many namespaces, so many characters in all; the oldest go
first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from keepwarm.explain.parts import Parts, likeness_chars

SHARED = ""
_PROMPTS = 48
_NAMESPACES = 64
# 32 million characters are some 60 MB at most; messages that repeat are kept once.
_CHARS = 32_000_000
# Candidates that are compared in full, the latest first.
_COMPARED = 16
# Less in common than this is chance: every prompt says "You are".
_LEAST_ALIKE_CHARS = 48
_LEAST_ALIKE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Remembered:
    """A prompt that was answered, its reply included.

    `ended_s` is when its answer was complete: only then is it there for others. `engine` tells
    which life of the engine that was, None if it is any. `reasoned`: the reply held reasoning that
    isn't part of `parts`.
    """

    id: str
    namespace: str
    parts: Parts
    digests: frozenset[bytes]
    at_s: float
    ended_s: float = 0.0
    engine: int | None = None
    reasoned: bool = False


class _Shelf:
    """The prompts of one namespace, oldest first, and those of them that have each mark."""

    def __init__(self) -> None:
        self.prompts: deque[Remembered] = deque()
        self._having: dict[bytes, deque[Remembered]] = {}

    def add(self, remembered: Remembered) -> None:
        self.prompts.append(remembered)
        for digest in remembered.digests:
            self._having.setdefault(digest, deque()).append(remembered)

    def having(self, digest: bytes) -> Sequence[Remembered]:
        return self._having.get(digest, ())

    def forget_oldest(self) -> Remembered:
        gone = self.prompts.popleft()
        for digest in gone.digests:
            having = self._having[digest]
            having.popleft()  # the oldest of all is the oldest of these
            if not having:
                del self._having[digest]
        return gone


class Recent:
    """See the module. Not thread-safe."""

    def __init__(self, *, prompts: int = _PROMPTS, chars: int = _CHARS) -> None:
        self._most_prompts = prompts
        self._most_chars = chars
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self.chars = 0

    def __len__(self) -> int:
        """Prompts remembered."""
        return sum(len(shelf.prompts) for shelf in self._shelves.values())

    def nearest(
        self, marks: Sequence[bytes], parts: Parts, *, namespace: str, before_s: float
    ) -> Remembered | None:
        """The remembered prompt that this one has most in common with; None if none is like it.

        `marks` are the digests of the prompt's marks, the head's first. What was answered after
        `before_s`, when this one arrived, can't have been warm for it.
        """
        names = (SHARED, namespace) if namespace else (SHARED,)
        shelves = [self._shelves[name] for name in reversed(names) if name in self._shelves]

        def known(kept: Iterable[Sequence[Remembered]]) -> list[Remembered]:
            return [r for each in kept for r in reversed(each) if r.ended_s <= before_s]

        for digest in reversed(marks[1:]):
            sharing = known(shelf.having(digest) for shelf in shelves)
            if sharing:
                is_whole = digest == marks[-1]  # nothing else can be more alike
                only = is_whole or len(sharing) == 1
                return sharing[0] if only else _most_alike(sharing, parts)[0]
        others = known(shelf.prompts for shelf in shelves)
        if not others:
            return None
        best, chars = _most_alike(others, parts)
        enough = max(_LEAST_ALIKE_CHARS, _LEAST_ALIKE_SHARE * parts.chars)
        return best if chars >= enough else None

    def add(self, remembered: Remembered, *, like: Remembered | None = None) -> None:
        """Remember a prompt. What it repeats of `like` is kept once."""
        if like is not None:
            remembered = replace(remembered, parts=_sharing(remembered.parts, like.parts))
        shelf = self._shelves.setdefault(remembered.namespace, _Shelf())
        self._shelves.move_to_end(remembered.namespace)
        shelf.add(remembered)
        self.chars += remembered.parts.chars
        if remembered.namespace != SHARED and len(shelf.prompts) > self._most_prompts:
            self.chars -= shelf.forget_oldest().parts.chars
        while self.chars > self._most_chars or len(self._shelves) > _NAMESPACES:
            if not self._forget_oldest(keep=remembered.namespace):
                break

    def forget(self, namespace: str) -> None:
        """Forget all prompts of one namespace."""
        gone = self._shelves.pop(namespace, None)
        if gone:
            self.chars -= sum(remembered.parts.chars for remembered in gone.prompts)

    def share(self, prompts: Iterable[Remembered]) -> None:
        """Set what everyone may be compared with: the tiers."""
        old = self._shelves.pop(SHARED, None)
        if old:
            self.chars -= sum(r.parts.chars for r in old.prompts)
        for prompt in prompts:
            self.add(replace(prompt, namespace=SHARED))

    def _forget_oldest(self, *, keep: str) -> bool:
        """Forget the oldest prompt of the namespace that has been silent for longest.

        False if only the tiers and the last prompt of `keep` are left.
        """
        for name, shelf in self._shelves.items():
            if name == SHARED or (name == keep and len(shelf.prompts) == 1):
                continue
            self.chars -= shelf.forget_oldest().parts.chars
            if not shelf.prompts:
                del self._shelves[name]
            return True
        return False


def _most_alike(prompts: Sequence[Remembered], parts: Parts) -> tuple[Remembered, int]:
    """The most alike of the latest, and the characters in common; the latest of equals."""
    scored = [(likeness_chars(r.parts, parts), -i, r) for i, r in enumerate(prompts[:_COMPARED])]
    chars, _, best = max(scored, key=lambda item: item[:2])
    return best, chars


def _sharing(parts: Parts, old: Parts) -> Parts:
    """The same parts, with what `old` has too replaced by its objects."""
    tools = old.tools if parts.tools == old.tools else parts.tools
    arguments = old.arguments if parts.arguments == old.arguments else parts.arguments
    count = 0
    for a, b in zip(old.segments, parts.segments, strict=False):
        if a != b:
            break
        count += 1
    segments = (*old.segments[:count], *parts.segments[count:])
    # A call's arguments may be equal as values and yet be rendered otherwise.
    sent = tuple(
        a if i < count and a is not None and a == b and "tool_calls" not in a else b
        for i, (a, b) in enumerate(
            zip((*old.sent, *[None] * len(parts.sent)), parts.sent, strict=False)
        )
    )
    return Parts(tools, arguments, segments, sent)
