"""Prompts in tokens: rendered by the engine's template and tokenised by its own tokenizer.

Theory of operation. Rendering is cheap, tokenising isn't (7 ms a thousand tokens on a slow
machine), and most of a prompt was tokenised before: as another prompt's beginning. A tokenizer
never joins what stands on the two sides of a special token, so a text may be cut behind one. The
counter remembers texts with their tokens, finds the one that a new text has most in common with,
cuts it behind the last end of a turn in that, and has only the rest tokenised.

Which token ends a turn is found by rendering a conversation, and that a text cut behind it gives
the same tokens is proved on the running engine (`prepare`). Where it doesn't, whole texts are
tokenised each time: slower, and as right.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from keepwarm.core.texts import common_chars
from keepwarm.core.tree import Tokens, as_tokens
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineDownError, EngineError

# Texts that are remembered: as many as slots and prefixes usually are, and none over 64 MB in all.
_TEXTS, _TEXT_CHARS = 32, 16_000_000
# What ends a turn in the templates in use; one of them, or the model's end of text, is looked for.
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>"),
    *("<|endoftext|>", "</s>", "<|end_of_sentence|>"),
)
_CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What hour is it?"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "  And now?\n"},
    ]
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": "{}"}}
# What a template may write otherwise once more follows: reasoning, tools, calls and their results.
_HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What hour is it in Oslo?"},
    {"role": "assistant", "content": "", "reasoning_content": "A clock.", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "Clock says noon."},
    {"role": "assistant", "content": "Noon.", "reasoning_content": "So it is noon."},
    {"role": "user", "content": "And in Rome, please?"},
    {"role": "assistant", "content": "Noon.", "reasoning_content": "The same."},
    {"role": "user", "content": "And in Cairo?"},
]
_NO_PICTURE = "data:image/png;base64,AA=="
# What may follow an end of turn: line breaks, spaces, letters, digits, another special token.
_FOLLOWING = ("\n", " and on", "word", "42", "\n\n  x", "é", "\t")


@dataclass(frozen=True, slots=True)
class _Cut:
    """What texts may be cut behind: a special token, and how it is written."""

    text: str
    token: int


class PromptCounter:
    """See the module. All methods are called on one event loop."""

    def __init__(self, client: EngineClient, *, template: str = "") -> None:
        """`template` is the text of the engine's chat template, as far as that is known."""
        self.client = client
        self.tells_time = "strftime_now" in template
        """Whether the template prints the date or the time: what was rendered once may be past."""
        self._cut: _Cut | None = None
        self._media_marker = ""
        self._known: OrderedDict[str, Tokens] = OrderedDict()
        self._chars = 0
        self.appends = False
        """Whether the template renders a history the same whatever follows it."""
        self.tokenized_chars = 0
        """Characters that the engine was given to tokenise: what counting has cost."""

    async def prepare(self) -> None:
        """Find out where texts may be cut, and what becomes of them. Raises: EngineDownError."""
        self._media_marker = str((await self._props()).get("media_marker") or "")
        self.appends = await self._does_append()
        try:
            text = await self.client.render(_CONVERSATION)
            for written in _TURN_ENDS:
                if written in text and (cut := await self._proved(written, text)):
                    self._cut = cut
                    return
        except EngineDownError:
            raise
        except EngineError:
            return  # a template that refuses such a conversation: whole texts, then

    async def _props(self) -> dict[str, Any]:
        try:
            return await self.client.props()
        except EngineDownError:
            raise
        except EngineError:
            return {}  # a server that keeps that page to itself

    async def _does_append(self) -> bool:
        """Whether what was rendered stays as it was when a user asks anew."""
        steps = [_HISTORY[:4], _HISTORY[:6], _HISTORY]
        try:
            texts = [
                await self.client.render({"messages": step, "tools": [_TOOL]}) for step in steps
            ]
        except EngineDownError:
            raise
        except EngineError:
            return False
        return all(
            0 <= text.rfind(step[-1]["content"]) < common_chars(text, later)
            for (text, later), step in zip(pairwise(texts), steps, strict=False)
        )

    async def _proved(self, written: str, text: str) -> _Cut | None:
        before, _, behind = text.partition(written)
        head = before + written

        async def is_sum(after: str) -> bool:
            whole, rest = await asyncio.gather(
                self._tokens(head + after, special=True), self._tokens(after, special=False)
            )
            return whole == first + rest

        alone, first = await asyncio.gather(
            self._tokens(written, special=False), self._tokens(head, special=True)
        )
        if len(alone) != 1:
            return None
        proofs = await asyncio.gather(*map(is_sum, (behind, *_FOLLOWING, written)))
        return _Cut(written, alone[0]) if all(proofs) else None

    async def count(self, chat: Mapping[str, Any] | str) -> Tokens:
        """The tokens of a prompt: a chat body to render, or text.

        Raises:
            EngineRefusedError: the template, or what the engine checks before it, refuses it.
            EngineError: the engine can't be reached, or fails.
        """
        text = chat if isinstance(chat, str) else await self.client.render(chat)
        known = self._known.get(text)
        if known is None:
            known = await self._tokenized(text)
            self._remember(text, known)
        else:
            self._known.move_to_end(text)
        return known

    async def timed(
        self, chat: Mapping[str, Any] | str, *, has_media: bool = False
    ) -> tuple[Tokens | None, float]:
        """As `count`, or `count_text` where the prompt `has_media`, and the seconds it took."""
        began_s = time.monotonic()
        tokens = await (self.count_text(chat) if has_media else self.count(chat))
        return tokens, time.monotonic() - began_s

    async def count_text(self, chat: Mapping[str, Any] | str) -> Tokens | None:
        """The tokens before a prompt's first picture or sound.

        The engine tokenises texts between media apart, so this is exact. None where its rendering
        doesn't show where media are.

        Raises: as `count`.
        """
        if isinstance(chat, str):
            return None
        # Without a projector the engine refuses it here, before it costs a restore.
        text = await self.client.render(_without_pictures(chat))
        if not self._media_marker or self._media_marker not in text:
            return None
        return await self.count(text.partition(self._media_marker)[0])

    async def _tokenized(self, text: str) -> Tokens:
        place, head = self._known_head(text)
        rest = await self._tokens(text[place:], special=place == 0)
        return as_tokens(rest) if place == 0 else np.concatenate([head, as_tokens(rest)])

    def _known_head(self, text: str) -> tuple[int, Tokens]:
        """How many characters of a text are known in tokens, up to a cut, and those tokens."""
        nothing = 0, as_tokens([])
        if self._cut is None:
            return nothing
        common, nearest = max(
            ((common_chars(known, text), known) for known in self._known), default=(0, "")
        )
        place = text.rfind(self._cut.text, 0, common) + len(self._cut.text)
        if not common or place < len(self._cut.text):
            return nothing
        tokens = self._known[nearest]
        cuts = np.flatnonzero(tokens == self._cut.token)
        # Text that only looks like the token would shift the count: then nothing is known.
        if len(cuts) != nearest.count(self._cut.text):
            return nothing
        return place, tokens[: int(cuts[nearest.count(self._cut.text, 0, place) - 1]) + 1]

    async def _tokens(self, text: str, *, special: bool) -> list[int]:
        self.tokenized_chars += len(text)
        return await self.client.tokenize(text, add_special=special) if text else []

    def _remember(self, text: str, tokens: Tokens) -> None:
        if text in self._known:
            return
        self._known[text] = tokens
        self._chars += len(text)
        while len(self._known) > 1 and (len(self._known) > _TEXTS or self._chars > _TEXT_CHARS):
            gone, _ = self._known.popitem(last=False)
            self._chars -= len(gone)


def _without_pictures(chat: Mapping[str, Any]) -> dict[str, Any]:
    """A chat body that renders the same, without the bytes that pictures bring or point to."""

    def part(one: Any) -> Any:
        is_picture = isinstance(one, Mapping) and one.get("type") == "image_url"
        return {**one, "image_url": {"url": _NO_PICTURE}} if is_picture else one

    def message(one: Any) -> Any:
        content = one.get("content") if isinstance(one, Mapping) else None
        return {**one, "content": list(map(part, content))} if isinstance(content, list) else one

    return {**chat, "messages": list(map(message, chat["messages"]))}


async def count_all(
    counter: PromptCounter, chats: list[Mapping[str, Any] | str]
) -> list[Tokens | None]:
    """The tokens of several prompts; None for one that can't be counted now."""

    async def one(chat: Mapping[str, Any] | str) -> Tokens | None:
        try:
            return await counter.count(chat)
        except EngineError:
            return None

    return list(await asyncio.gather(*map(one, chats)))
