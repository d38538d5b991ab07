"""Requests whose answers are known, and clients that ask them while something breaks.

Answers are compared token by token at temperature 0. Where the undisturbed run itself was undecided
between two tokens (`TIE` apart), either is right: prefilled in other pieces, the same prompt has
sums in another order.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from campaign_place import HEALTHY_WITHIN_S, Place

from served import Served

ANSWER_S = 60.0
CLIENTS = 3
# Of logprobs. Two runs of one prompt that differ in nothing but the order of sums differ by less.
TIE = 0.05
TOPICS = ("the backup disk", "the mail relay", "the family's page", "the second drive bay")
LONG = "Keep the log of the house short and name each thing that was looked at, in order. " * 12


@dataclass(frozen=True)
class Token:
    """A token of an answer, and how much likelier it was than the next best."""

    text: str
    gap: float


@dataclass(frozen=True)
class Question:
    """A request and the answer that an undisturbed run gave."""

    body: dict[str, Any]
    answer: tuple[Token, ...]

    def verdict(self, tokens: list[str]) -> str:
        """`right`, `tie` or `wrong`."""
        for known, token in zip(self.answer, tokens, strict=False):
            if known.text != token:
                return "tie" if known.gap < TIE else "wrong"
        return "right" if len(tokens) == len(self.answer) else "wrong"


def _body(messages: list[dict[str, Any]], model: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": messages,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }


def _tokens(choice: dict[str, Any]) -> list[Token]:
    listed = ((choice.get("logprobs") or {}).get("content")) or []
    out = []
    for token in listed:
        top = sorted((t["logprob"] for t in token["top_logprobs"]), reverse=True)
        out.append(Token(token["token"], top[0] - top[1] if len(top) > 1 else 99.0))
    return out


def questions(calm: Served) -> list[Question]:
    """Conversations on tiers and on system prompts of their own, each turn a question."""
    out = []
    for number, topic in enumerate(TOPICS * 2):
        own = [{"role": "system", "content": f"You look after {topic}. {LONG}"}]
        model, messages = (("minimal", "standard")[number % 2], []) if number < 4 else ("any", own)
        for turn in range(3):
            asked = {"role": "user", "content": f"Turn {turn}: what is the state of {topic}?"}
            messages = [*messages, asked]
            body = _body(messages, model)
            reply = calm.post("/v1/chat/completions", body)
            assert reply.status == 200, reply.body
            out.append(Question(body, tuple(_tokens(reply.body["choices"][0]))))
            messages = [*messages, {"role": "assistant", "content": reply.text}]
    return out


@dataclass
class Tally:
    """What became of requests: `right`, `tie`, `wrong`, `lost`, or `cut` and sent again."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, note: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if note:
                self.notes.append(f"{what}: {note}"[:600])


class CutError(Exception):
    """The answer ended in the middle; `begun`: bytes of it had come."""

    def __init__(self, why: str, *, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


def ask(served: Served, question: Question, *, stream: bool) -> list[str]:
    """An answer's tokens. Raises: CutError."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=ANSWER_S)
    begun = False
    try:
        raw = json.dumps({**question.body, "stream": stream})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", raw, headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise CutError(f"{reply.status} {reply.read()[:300]!r}", begun=False)
        if not reply.getheader("X-Keepwarm-Request-Id"):
            # Ports are chosen before they are listened on: an engine may have got this one.
            raise CutError("it isn't Keepwarm that answers at its port", begun=False)
        if not stream:
            choice = json.loads(reply.read())["choices"][0]
            return [token.text for token in _tokens(choice)]
        tokens: list[str] = []
        is_done = False
        for line in reply:
            if not line.startswith(b"data:"):
                continue
            if b"[DONE]" in line:
                is_done = True
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise CutError(str(event["error"])[:300], begun=begun)
            for choice in event.get("choices", []):
                tokens += [token.text for token in _tokens(choice)]
            begun = begun or bool(tokens)
        if not is_done:
            raise CutError("the stream ended without its end", begun=begun)
        return tokens
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CutError(repr(error), begun=begun) from error
    finally:
        connection.close()


class Load:
    """Clients that ask at the same time until `join`; what was cut in flight is sent again."""

    def __init__(self, place: Place, asked: list[Question], chance: random.Random) -> None:
        self._place = place
        self.tally = Tally()
        self._threads = []
        self._is_enough = threading.Event()
        for client in range(CLIENTS):
            own = [(q, chance.random() < 0.4) for q in asked[client::CLIENTS]]
            self._threads.append(threading.Thread(target=self._client, args=(own,)))

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Ask each question once at least, and wait for all answers."""
        self._is_enough.set()
        for thread in self._threads:
            thread.join()

    def _client(self, own: list[tuple[Question, bool]]) -> None:
        for number in itertools.count():
            if number >= len(own) and self._is_enough.is_set():
                return
            question, stream = own[number % len(own)]
            self._ask(question, stream=stream)

    def _ask(self, question: Question, *, stream: bool) -> None:
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            try:
                tokens = ask(self._place.gateway, question, stream=stream)
            except CutError as error:
                # In flight when the gateway itself was killed or stopped, or already begun.
                excused = self._place.is_killed or error.begun
                if not excused or time.monotonic() > deadline_s:
                    self.tally.add("lost", f"{error} (stream {stream})")
                    return
                self.tally.add("cut")
                time.sleep(0.1)
                continue
            verdict = question.verdict(tokens)
            said = "" if verdict != "wrong" else f"{tokens} for {question.answer}"
            self.tally.add(verdict, said)
            return


def until_healthy(place: Place, began_s: float) -> float | None:
    """Seconds until the gateway says that all is warm; None if it never does."""
    while time.monotonic() - began_s < HEALTHY_WITHIN_S:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", place.gateway.port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.monotonic() - began_s
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.02)
    return None
