"""Series of requests as agents and people make them, from a few small numbers.

Theory of operation. A series is a list of steps, and a step is an act, a conversation and a number:
so a strategy draws it, and a failing one is made shorter by leaving steps out. `Talks` turns it
into requests. It needs no server: the words come from a seed and the step's place, and replies
that are sent back are those of the caller, or other ones (a client that trims, a model that was
changed: what it sends back doesn't tokenise as it was decoded).

| act        | what it is                                                                   |
|------------|------------------------------------------------------------------------------|
| append     | the next user message; the number says whose reply stood before it           |
| tool       | one to three rounds of a tool's call and its result                          |
| regenerate | the last question again                                                      |
| edit       | the last question, or an earlier one, in other words; what followed is gone  |
| cut        | the oldest turns are dropped behind the system text                          |
| side       | a title asked on the same history, without thinking, tools kept or left out  |
| kwargs     | thinking off or on from now, or an argument that nothing renders             |
| tools      | other tools from now on, or none                                             |
| reason     | reasoning is sent back from now on, or isn't                                 |
| system     | another word in the middle of the system text                                |
| hang up    | a long question, its client gone in the middle of it, and asked again        |
| pause      | a second in which nobody asks                                                |
| kill       | the server is killed and started again                                       |
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Message = dict[str, Any]
Body = dict[str, Any]

ACTS = (
    *("append", "tool", "regenerate", "edit", "cut", "side", "kwargs"),
    *("tools", "reason", "system", "hang up", "pause", "kill"),
)
MOST_NUMBER = 3
TALKS = 4
REPLY_TOKENS = 8
# So long that a client can leave in the middle of its prefill on a tiny model.
LONG_TOKENS = 10_000
_HANG_UPS = 2
_WORDS = """
time year people way day man thing woman life child world school state family student group
country hand part place case week company system question work number night point home water
room mother area money story fact month lot right study book eye job word business issue side
""".split()  # noqa: SIM905 - a list of them would be a page


@dataclass(frozen=True)
class Step:
    """One act on one of the conversations."""

    act: str
    talk: int
    number: int

    def __str__(self) -> str:
        return f"{self.act}:{self.talk}:{self.number}"


def steps_of(written: str) -> list[Step]:
    """A series as `Step` writes itself, joined by commas."""
    parts = [one.strip().split(":") for one in written.split(",")]
    return [Step(act, int(talk), int(number)) for act, talk, number in parts]


def series(least: int = 6, most: int = 14) -> st.SearchStrategy[list[Step]]:
    """A series over two to four conversations; an ordinary turn is as likely as all else."""
    acts = st.one_of(st.sampled_from(("append", "tool")), st.sampled_from(ACTS))

    def of(talks: int) -> st.SearchStrategy[list[Step]]:
        numbers = st.integers(0, MOST_NUMBER)
        step = st.builds(Step, acts, st.integers(0, talks - 1), numbers)
        return st.lists(step, min_size=least, max_size=most)

    return st.integers(2, TALKS).flatmap(of)


@dataclass(frozen=True)
class Ask:
    """A request; `hangs_up`: its client leaves in the middle of the prefill."""

    body: Body
    hangs_up: bool = False


class Pause:
    """Nobody asks for a second."""


class Kill:
    """The server is killed and started again."""


Event = Ask | Pause | Kill


def text(tokens: int, seed: object) -> str:
    """About so many tokens that nothing else begins with."""
    pick = random.Random(f"{seed}")
    return " ".join(pick.choice(_WORDS) for _ in range(tokens))


@dataclass
class _Talk:
    seed: str
    history: list[Message]
    more: Body = field(default_factory=dict)
    reasons: bool = True
    calls: int = 0

    @property
    def is_answered(self) -> bool:
        return self.history[-1]["role"] == "assistant"


class Talks:
    """Conversations, led on by steps. `events` gives requests and takes replies by `send`."""

    def __init__(self, seed: object) -> None:
        self.seed = seed
        self._talks: dict[int, _Talk] = {}

    def events(self, steps: list[Step]) -> Iterator[Event]:
        """What is done for each step. A message of the model's is sent back for each `Ask`."""
        for place, step in enumerate(_bounded(steps)):
            if step.act == "pause":
                yield Pause()
            elif step.act == "kill":
                yield Kill()
            else:
                talk = self._talk(step.talk)
                yield from self._act(talk, step, f"{self.seed}/{place}")

    def _talk(self, number: int) -> _Talk:
        if number not in self._talks:
            seed = f"{self.seed}:{number}"
            system = {"role": "system", "content": text(300 + 200 * number, f"{seed}s")}
            talk = _Talk(seed, [system])
            if number % 2:
                talk.more["tools"] = _tools(2, seed)
            self._talks[number] = talk
        return self._talks[number]

    def _act(self, talk: _Talk, step: Step, seed: str) -> Iterator[Event]:
        number = step.number
        change = getattr(self, f"_{step.act.replace(' ', '_')}", None)
        if change is not None:
            yield from change(talk, number, seed)
            return
        match step.act:
            case "regenerate":
                self._unanswered(talk, 1)
            case "edit":
                self._unanswered(talk, 1 + number // 2)
                _renew_question(talk, seed)
            case "cut":
                _drop_oldest(talk, 1 + number // 2)
            case "kwargs":
                _set_arguments(talk, number)
            case "tools":
                talk.more["tools"] = _tools(number, f"{talk.seed}{number}")
                if not number:
                    del talk.more["tools"]
            case "reason":
                talk.reasons = number % 2 == 0
            case "system":
                _change_system(talk, seed)
        if talk.history[-1]["role"] in {"assistant", "system"}:
            talk.history.append(_user(text(40 + 30 * number, f"{seed}u")))
        yield from self._asked(talk, number, seed)

    def _append(self, talk: _Talk, number: int, seed: str) -> Iterator[Event]:
        talk.history.append(_user(text(20 + 60 * number, f"{seed}u")))
        yield from self._asked(talk, number, seed)

    def _tool(self, talk: _Talk, number: int, seed: str) -> Iterator[Event]:
        if talk.history[-1]["role"] in {"assistant", "system"}:
            talk.history.append(_user(text(30, f"{seed}u")))
        for round_ in range(1 + number // 2):
            yield Ask(self._body(talk))
            talk.calls += 1
            ident = f"call{talk.calls:05}"
            arguments = json.dumps({"path": text(6, f"{seed}p{round_}")})
            call = {
                "id": ident,
                "type": "function",
                "function": {"name": "tool_0", "arguments": arguments},
            }
            talk.history.append(_assistant("", text(60, f"{seed}r{round_}"), [call]))
            result = text(100 + 50 * number, f"{seed}t{round_}")
            talk.history.append({"role": "tool", "tool_call_id": ident, "content": result})
        yield from self._asked(talk, number, seed)

    def _side(self, talk: _Talk, number: int, seed: str) -> Iterator[Event]:
        body = self._body(talk) | {"chat_template_kwargs": {"enable_thinking": False}}
        if number % 2:
            body.pop("tools", None)
        history = list(body["messages"])
        if history[-1]["role"] == "user":
            history.pop()
        yield Ask(body | {"messages": [*history, _user("Give a short title to this talk.")]})

    def _hang_up(self, talk: _Talk, number: int, seed: str) -> Iterator[Event]:
        talk.history.append(_user(text(LONG_TOKENS, f"{seed}long")))
        yield Ask(self._body(talk), hangs_up=True)
        if number % 2:
            other = [_user(text(250, f"{seed}other"))]
            yield Ask({"messages": other})
        yield from self._asked(talk, 0, seed)

    def _asked(self, talk: _Talk, number: int, seed: str) -> Iterator[Event]:
        """Ask, and put a reply behind it: the model's own, or another one."""
        reply = yield Ask(self._body(talk))
        thought = text(40, f"{seed}th")
        said = reply if number % 2 and reply is not None else text(30, f"{seed}a")
        talk.history.append(_assistant(said, thought))

    @staticmethod
    def _unanswered(talk: _Talk, turns: int) -> None:
        """Take the history back to a question, the last one or an earlier one."""
        asked = [i for i, m in enumerate(talk.history) if m["role"] == "user"]
        if asked:
            del talk.history[asked[max(len(asked) - turns, 0)] + 1 :]

    @staticmethod
    def _body(talk: _Talk) -> Body:
        messages = [dict(message) for message in talk.history]
        if not talk.reasons:
            for message in messages:
                message.pop("reasoning_content", None)
        return {"messages": messages, **talk.more}


def _bounded(steps: list[Step]) -> Iterator[Step]:
    """At most two long questions, so that all conversations fit into one context."""
    left = _HANG_UPS
    for step in steps:
        is_long = step.act == "hang up"
        yield step if left or not is_long else Step("append", step.talk, step.number)
        left -= is_long and left > 0


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, thought: str, calls: list[Message] | None = None) -> Message:
    said = {"role": "assistant", "content": content, "reasoning_content": thought}
    return said | ({"tool_calls": calls} if calls else {})


def _tools(count: int, seed: str) -> list[Message]:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}",
                "description": text(40, f"{seed}tool{i}"),
                "parameters": parameters,
            },
        }
        for i in range(count)
    ]


def _renew_question(talk: _Talk, seed: str) -> None:
    if talk.history[-1]["role"] == "user":
        words = talk.history[-1]["content"].split()
        kept = " ".join(words[: len(words) // 2])
        talk.history[-1] = _user(f"{kept} {text(30, f'{seed}e')}")


def _drop_oldest(talk: _Talk, turns: int) -> None:
    asked = [i for i, m in enumerate(talk.history) if m["role"] == "user"]
    if len(asked) > turns:
        del talk.history[1 : asked[turns]]


def _set_arguments(talk: _Talk, number: int) -> None:
    arguments = ({"enable_thinking": False}, None, {"nothing_renders_it": 1}, None)[number]
    talk.more.pop("chat_template_kwargs", None)
    if arguments is not None:
        talk.more["chat_template_kwargs"] = arguments


def _change_system(talk: _Talk, seed: str) -> None:
    words = talk.history[0]["content"].split()
    words[len(words) // 2] = random.Random(seed).choice(("seven", "eleven", "twelve"))
    talk.history[0] = {"role": "system", "content": " ".join(words)}


# What templates in use differ in: where tools stand, and when reasoning is rendered.
_TURN = """\
{%- macro turn(role, text) -%}
{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- macro tool_text() -%}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\\n</tools>' -}}
{%- endmacro -%}
{%- macro calls(message) -%}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{%- if call.function.arguments is string -%}{{- call.function.arguments -}}
{%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}@SYSTEM@
{%- elif message.role == 'user' -%}@USER@
{%- elif message.role == 'tool' -%}{{- turn('tool', message.content) -}}
{%- else -%}@ASSISTANT@
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}@GENERATION@{%- endif -%}
"""
_PLAIN = "{{- turn(message.role, message.content) -}}"
_SAYS = "{{- turn('assistant', (message.content or '') + calls(message)) -}}"
_BEHIND = (
    "{%- if tools and loop.first -%}"
    "{{- turn('system', message.content + '\\n\\n' + tool_text()) -}}"
    "{%- else -%}" + _PLAIN + "{%- endif -%}"
)
_BEFORE = _BEHIND.replace(
    "message.content + '\\n\\n' + tool_text()", "tool_text() + '\\n\\n' + message.content"
)
_LATE = (
    "{%- if tools and loop.index0 == ns.last -%}{{- turn('system', tool_text()) -}}{%- endif -%}"
    + _PLAIN
)
_THINKS = (
    "{%- if message.reasoning_content and loop.index0 > ns.last -%}"
    "{{- turn('assistant', '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' + "
    "(message.content or '') + calls(message)) -}}{%- else -%}" + _SAYS + "{%- endif -%}"
)
_NO_THINKING = (
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
)
TEMPLATES: dict[str, dict[str, str]] = {
    "thinking": {"ASSISTANT": _THINKS, "GENERATION": _NO_THINKING},
    "late": {"SYSTEM": _PLAIN, "USER": _LATE},
    "behind": {},
    "before": {"SYSTEM": _BEFORE},
    "dropped": {"SYSTEM": _PLAIN},
}


def write_template(name: str, folder: Path) -> Path:
    """One of `TEMPLATES` as a file: tools behind or before the system text, late, or dropped.

    `thinking` renders reasoning behind the last user message only.
    """
    parts = {"SYSTEM": _BEHIND, "USER": _PLAIN, "ASSISTANT": _SAYS, "GENERATION": ""}
    written = _TURN
    for part, value in (parts | TEMPLATES[name]).items():
        written = written.replace(f"@{part}@", value)
    path = folder / f"{name}.jinja"
    path.write_text(written)
    return path
