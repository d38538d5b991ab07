"""What a client makes of a reply in the history that it sends back, learned from what it sends.

Most send back what they got. Others leave the reasoning out, take white space off the text's ends,
or read a call's arguments and print them again. For each client (a namespace and a static part) the
last reply that could show one of these is remembered, and the next reply is rendered by that.
Nothing else is guessed: a history that was changed in another way has cost idle time.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from keepwarm.core.job import Job

# Clients, and replies that wait for their history: what was used longest ago is forgotten.
_CLIENTS, _REPLIES = 256, 64


class RewrittenForm(NamedTuple):
    """How a call's arguments are printed again."""

    separators: tuple[str, str]
    is_ascii: bool

    def printed(self, arguments: str) -> str:
        """Arguments in this form; what can't be read stays as it is."""
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return json.dumps(value, separators=self.separators, ensure_ascii=self.is_ascii)


# JavaScript's `JSON.stringify`, Python's `json.dumps`, and what many Python clients make of that.
_FORMS = (
    RewrittenForm((",", ":"), False),
    RewrittenForm((", ", ": "), True),
    RewrittenForm((", ", ": "), False),
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """One client's way; `form` is None where arguments come back as they were sent."""

    drops_reasoning: bool = False
    trims: bool = False
    form: RewrittenForm | None = None

    def applied(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A reply as the client will send it back."""
        out = dict(message)
        if self.drops_reasoning:
            out.pop("reasoning_content", None)
        if self.trims:
            out["content"] = _text(message).strip()
        if self.form and "tool_calls" in out:
            out["tool_calls"] = [_reprinted(call, self.form) for call in out["tool_calls"]]
        return out

    def learned(self, said: Mapping[str, Any], returned: Mapping[str, Any]) -> Rewriting:
        """This way, corrected by what came back of a reply as far as that can tell."""
        way = self
        if said.get("reasoning_content"):
            way = replace(way, drops_reasoning=not returned.get("reasoning_content"))
        text, back = _text(said), _text(returned)
        if text != text.strip() and back in (text, text.strip()):
            way = replace(way, trims=back != text)
        for call, again in zip(_arguments(said), _arguments(returned), strict=False):
            forms = [form for form in _FORMS if form.printed(call) != call]
            if forms and call == again:
                way = replace(way, form=None)
            elif alike := [form for form in forms if form.printed(call) == again]:
                way = replace(way, form=way.form if way.form in alike else alike[0])
        return way


class _Said(NamedTuple):
    """A reply: whose, and behind how many messages."""

    namespace: str
    place: int
    message: Mapping[str, Any]


@dataclass(slots=True)
class Rewritings:
    """The ways of all clients, and the replies from which they are learned."""

    _ways: OrderedDict[tuple[str, bytes], Rewriting] = field(default_factory=OrderedDict)
    _said: OrderedDict[bytes, _Said] = field(default_factory=OrderedDict)

    def way(self, job: Job) -> Rewriting:
        """What the client of this job is known to do with a reply."""
        return self._ways.get(_client(job), Rewriting())

    def answered(self, job: Job, message: Mapping[str, Any] | None) -> None:
        """A request was answered: learn from its history, and wait for what becomes of the reply.

        A mark tells the whole prompt before it, so the message behind it in a longer prompt is what
        has become of the reply to it.
        """
        messages = job.chat.get("messages") if isinstance(job.chat, Mapping) else None
        if not isinstance(messages, list) or job.prompt.is_raw:
            return
        for mark in job.prompt.marks[:-1]:
            if (known := self._said.pop(mark.digest, None)) is None:
                continue
            returned = messages[known.place] if known.place < len(messages) else None
            if isinstance(returned, Mapping) and returned.get("role") == "assistant":
                self._learn(_client(job), known.message, returned)
        if message is not None:
            said = _Said(job.namespace, len(messages), message)
            self._said[job.prompt.marks[-1].digest] = said
            if len(self._said) > _REPLIES:
                self._said.popitem(last=False)

    def forget(self, namespace: str) -> None:
        """Forget what one key's clients were told, and what they do with it."""
        for digest in [d for d, said in self._said.items() if said.namespace == namespace]:
            del self._said[digest]
        for client in [client for client in self._ways if client[0] == namespace]:
            del self._ways[client]

    def _learn(
        self, client: tuple[str, bytes], said: Mapping[str, Any], returned: Mapping[str, Any]
    ) -> None:
        before = self._ways.pop(client, Rewriting())
        self._ways[client] = before.learned(said, returned)
        if len(self._ways) > _CLIENTS:
            self._ways.popitem(last=False)


def _client(job: Job) -> tuple[str, bytes]:
    return job.namespace, job.prompt.static.digest if job.prompt.static else b""


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [c for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []


def _arguments(message: Mapping[str, Any]) -> list[str]:
    functions = (call.get("function") for call in _calls(message))
    found = [f.get("arguments") for f in functions if isinstance(f, Mapping)]
    return [arguments for arguments in found if isinstance(arguments, str)]


def _reprinted(call: Mapping[str, Any], form: RewrittenForm) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = form.printed(function["arguments"])
    return {**call, "function": function}
