"""Tiers: named static prompts that continue one another.

A tier is a list of texts and tools, its base's first and then its own. How they are laid out
decides what two tiers share. The base's text is the first system message; tools belong to the
request and are rendered by the chat template, usually right behind it; an extending tier's own text
comes after that, as a further message. With a template that does so, the tokens of minimal's text
open standard's prompt, and those of standard open full's:

    minimal   [system: identity]
    standard  [system: identity + tools] [system: standard's context]
    full      [system: identity + tools] [system: standard's context] [system: full's context]

Not every template takes a second system message, so the place of an extending tier's text is a
setting (`ContextRole`). Everything here is a function of values; reading the directory is
`keepwarm.tiers.files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.volatile import Volatile, find_volatile
from keepwarm.errors import RequestError, TierError

__all__ = [
    "ACKNOWLEDGEMENT",
    "DEFAULT_AGENT_NAME",
    "NEED_MORE",
    "ContextRole",
    "Message",
    "Tier",
    "TierSet",
    "TierSource",
    "TierText",
    "Volatile",
    "build_tiers",
    "compose",
    "find_volatile",
    "render_text",
]

DEFAULT_AGENT_NAME = "Keeper"

NEED_MORE = "NEED_MORE:"
"""How a reply starts by which the model says that its tier is too small for the task.

One of the tier's `need_more` words follows: `NEED_MORE: tools`.
"""

ACKNOWLEDGEMENT = "Understood."
"""The assistant's static answer after a context in the user role.

Templates that take no second system message mostly insist on user and assistant in turn.
"""

# `auto` is the virtual model that lets the router choose; no tier can be called so.
_RESERVED_NAMES = frozenset({"auto"})
_TIER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}\Z")
# {{word}} stands for a literal {word}; anything with a blank, quote or colon in the braces is text.
_PLACEHOLDER = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


class ContextRole(StrEnum):
    """Where the text of a tier that extends another goes."""

    SYSTEM = "system"
    """A system message of its own, behind the tools. Nests exactly; some templates refuse it."""

    USER = "user"
    """A user message and a static answer. Nests exactly, but the text has less authority."""

    MERGE = "merge"
    """Into the first system message. Every template takes it; what a template puts behind that
    message (tools) is then behind the larger text, and isn't shared with the smaller tier."""


@dataclass(frozen=True, slots=True)
class Message:
    """One static message of a tier, as it is sent."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class TierText:
    """The text that one tier brings, and where it goes."""

    tier: str
    text: str
    role: ContextRole


@dataclass(frozen=True, slots=True)
class TierSource:
    """What one tier itself says, before it is joined to its base.

    `folder` only names the place in error messages. `text` is None if the tier brings tools alone.
    """

    name: str
    folder: str
    description: str
    text: str | None
    text_file: str
    extends: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    context_role: ContextRole = ContextRole.SYSTEM
    need_more: tuple[str, ...] = ()
    is_default: bool = False


@dataclass(frozen=True, slots=True)
class Tier:
    """A whole static prompt: what its base brings, then its own.

    `messages` are put before the client's, in order; `tools` before the client's tools. Both are
    the same objects in every request and must not be changed. `need_more` are the words the model
    may put behind `NEED_MORE`; `depth` is the number of tiers below this one. `client_role` says
    where a system message of the client's own goes.
    """

    name: str
    description: str
    extends: str | None
    segments: tuple[TierText, ...]
    tools: tuple[dict[str, Any], ...]
    need_more: tuple[str, ...] = ()
    is_default: bool = False
    depth: int = 0
    client_role: ContextRole = ContextRole.SYSTEM
    messages: tuple[Message, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Lay the texts out once: requests are composed far more often than tiers are built."""
        object.__setattr__(self, "messages", _lay_out(self.segments))

    @property
    def text_chars(self) -> int:
        """Characters of all static texts, tools not counted."""
        return sum(len(segment.text) for segment in self.segments)

    @property
    def static_chars(self) -> int:
        """Characters of all static texts and of the tools as JSON."""
        return self.text_chars + len(json.dumps(self.tools))

    @property
    def takes_in_system(self) -> bool:
        """Whether a system message that opens a request goes into the tier's own messages."""
        return self.client_role is not ContextRole.SYSTEM

    def with_context_role(self, role: ContextRole) -> Tier:
        """This tier with the texts of all extending tiers, and the client's, moved to `role`."""
        first, *others = self.segments
        moved = (first, *(replace(segment, role=role) for segment in others))
        return replace(self, segments=moved, client_role=role)


class TierSet:
    """All tiers, a base before the tiers that extend it; of equals the shorter first.

    Immutable. `in`, `len` and iteration work as for a sequence of tiers keyed by name.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        """Take tiers whose bases are among them.

        Raises:
            TierError: there are none, or more than one is the default.
        """
        if not tiers:
            raise TierError(
                "There is no tier: the tiers' directory holds no folder with a tier.toml."
            )
        ordered = sorted(tiers, key=lambda t: (t.depth, t.text_chars, t.name))
        self._by_name = {tier.name: tier for tier in ordered}
        defaults = [tier for tier in ordered if tier.is_default]
        if len(defaults) > 1:
            names = " and ".join(tier.name for tier in defaults)
            raise TierError(f"Tiers {names} both say `default = true`; only one can.")
        self._default = defaults[0] if defaults else ordered[0]

    def __iter__(self) -> Iterator[Tier]:
        """The tiers in nesting order."""
        return iter(self._by_name.values())

    def __len__(self) -> int:
        """How many tiers there are."""
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        """Whether a tier has that name."""
        return name in self._by_name

    @property
    def names(self) -> tuple[str, ...]:
        """The tiers' names in nesting order."""
        return tuple(self._by_name)

    @property
    def default(self) -> Tier:
        """The tier that says `default = true`, else the first."""
        return self._default

    def get(self, name: str) -> Tier | None:
        """The tier of that name."""
        return self._by_name.get(name)

    def next_up(self, name: str) -> Tier | None:
        """The tier that extends `name` (the shortest if several do), None at the top.

        Raises:
            KeyError: there is no tier `name`.
        """
        base = self._by_name[name]
        return next((tier for tier in self if tier.extends == base.name), None)

    def chain(self, name: str) -> tuple[Tier, ...]:
        """The tier's bases, root first, and itself.

        Raises:
            KeyError: there is no tier `name`.
        """
        tier = self._by_name[name]
        below = self.chain(tier.extends) if tier.extends is not None else ()
        return (*below, tier)

    def with_context_role(self, role: ContextRole) -> TierSet:
        """The same tiers laid out for a template that takes extending texts only as `role`."""
        return TierSet([tier.with_context_role(role) for tier in self])


def build_tiers(sources: Sequence[TierSource], *, agent_name: str) -> TierSet:
    """Join each tier to its base, write the agent's name into the texts, and check the result.

    Raises:
        TierError: a name that can't be used, an unknown base or a cycle, a text that is empty or
            has an unknown placeholder, a tool's name twice, a `need_more` the text doesn't explain.
    """
    by_name = {source.name: source for source in sources}
    for source in sources:
        _check_name(source)
    return TierSet([_join(_bases(source, by_name), agent_name) for source in sources])


def compose(tier: Tier, body: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a chat-completions body with the tier's messages and tools before the client's.

    The client's messages and tools keep their order; a system message that opens its messages goes
    where the tier's `client_role` says. A tool that the client sends just as the tier has it isn't
    sent twice. The copy shares messages and tools with `body` and `tier`.

    Raises:
        RequestError: `messages` or `tools` isn't a list, or the client defines a tool of the tier
            otherwise: the model could then not tell which of the two it calls.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("`messages` must be a list of messages.")
    composed = dict(body)
    static = tier.messages
    own_system = _opening_system_text(messages)
    if own_system is not None and tier.takes_in_system:
        static = _lay_out((*tier.segments, TierText("", own_system, tier.client_role)))
        messages = messages[1:]
    composed["messages"] = [{"role": m.role, "content": m.text} for m in static] + messages
    tools = _join_tools(tier, body.get("tools"))
    if tools:
        composed["tools"] = tools
    return composed


def render_text(text: str, *, agent_name: str, source: str) -> str:
    """`text` with `{agent_name}` filled in and `{{word}}` reduced to `{word}`.

    Raises:
        TierError: another `{word}`; it names `source` and the line.
    """

    def fill(match: re.Match[str]) -> str:
        literal, word = match.groups()
        if literal is not None:
            return "{" + str(literal) + "}"
        if word == "agent_name":
            return agent_name
        line = text.count("\n", 0, match.start()) + 1
        raise TierError(
            f"{source}, line {line}: unknown placeholder {{{word}}}. Only {{agent_name}} is known; "
            f"write {{{{{word}}}}} for the text itself."
        )

    return _PLACEHOLDER.sub(fill, text)


def _lay_out(segments: Sequence[TierText]) -> tuple[Message, ...]:
    first, *others = segments
    merged = [first.text, *(s.text for s in others if s.role is ContextRole.MERGE)]
    messages = [Message("system", "\n\n".join(merged))]
    for segment in others:
        if segment.role is not ContextRole.MERGE:
            messages.append(Message(segment.role.value, segment.text))
        if segment.role is ContextRole.USER:
            messages.append(Message("assistant", ACKNOWLEDGEMENT))
    return tuple(messages)


def _opening_system_text(messages: Sequence[Any]) -> str | None:
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") not in SYSTEM_ROLES:
        return None
    content = first.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _check_name(source: TierSource) -> None:
    if not _TIER_NAME.match(source.name):
        raise TierError(
            f"{source.folder}: a tier's name is its folder's: up to 32 of a-z, 0-9, '-' and '_', "
            "a letter first."
        )
    if source.name in _RESERVED_NAMES:
        raise TierError(f"{source.folder}: the name {source.name!r} is taken by the router.")


def _bases(source: TierSource, by_name: Mapping[str, TierSource]) -> list[TierSource]:
    """The sources a tier is made of, root first."""
    chain = [source]
    while (base := chain[-1].extends) is not None:
        names = [link.name for link in chain]
        if base in names:
            circle = " -> ".join([*names[names.index(base) :], base])
            raise TierError(f"{chain[-1].folder}/tier.toml: `extends` goes in a circle: {circle}.")
        if base not in by_name:
            known = ", ".join(sorted(by_name))
            raise TierError(
                f"{chain[-1].folder}/tier.toml: `extends` names the tier {base!r}, "
                f"which isn't there. There are: {known}."
            )
        chain.append(by_name[base])
    return chain[::-1]


def _join(chain: Sequence[TierSource], agent_name: str) -> Tier:
    own = chain[-1]
    segments = []
    for source in chain:
        if source.text is None:
            continue
        where = f"{source.folder}/{source.text_file}"
        text = render_text(source.text.strip(), agent_name=agent_name, source=where)
        if not text:
            raise TierError(f"{where} is empty.")
        role = ContextRole.SYSTEM if source is chain[0] else source.context_role
        segments.append(TierText(source.name, text, role))
    if chain[0].text is None:
        raise TierError(f"{chain[0].folder}: a tier that extends nothing needs a system.md.")
    if own.text is None and not own.tools:
        raise TierError(f"{own.folder}: the tier adds neither text nor tools to {own.extends!r}.")
    _check_need_more(own, segments)
    return Tier(
        name=own.name,
        description=own.description,
        extends=own.extends,
        segments=tuple(segments),
        tools=_unique_tools(chain),
        need_more=own.need_more,
        is_default=own.is_default,
        depth=len(chain) - 1,
        client_role=own.context_role,
    )


def _check_need_more(own: TierSource, segments: Sequence[TierText]) -> None:
    """A word that no text explains would never be said: the tier could not be left."""
    for word in own.need_more:
        if not any(f"{NEED_MORE} {word}" in segment.text for segment in segments):
            raise TierError(
                f"{own.folder}/tier.toml: `need_more` has {word!r}, but no text of the tier says "
                f"when to answer `{NEED_MORE} {word}`."
            )


def _unique_tools(chain: Sequence[TierSource]) -> tuple[dict[str, Any], ...]:
    tools: dict[str, dict[str, Any]] = {}
    for source in chain:
        for tool in source.tools:
            name = tool["function"]["name"]
            if name in tools:
                raise TierError(f"{source.folder}/tools.json: the tool {name!r} is there twice.")
            tools[name] = tool
    return tuple(tools.values())


def _join_tools(tier: Tier, client_tools: object) -> list[Any]:
    if client_tools is None:
        return list(tier.tools)
    if not isinstance(client_tools, list):
        raise RequestError("`tools` must be a list of tools.")
    known = {tool["function"]["name"]: tool for tool in tier.tools}
    joined: list[Any] = list(tier.tools)
    for tool in client_tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in known:
            joined.append(tool)  # what isn't well formed is the engine's to refuse
        elif tool != known[name]:
            raise RequestError(
                f"The tier {tier.name!r} has a tool {name!r} that is defined otherwise. Rename "
                "yours, or choose a tier without it."
            )
    return joined
