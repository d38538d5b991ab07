"""A real engine whose model says what a test wants: reasoning, text, and calls of tools.

All but the words is the engine's own: it renders the prompt, computes it, and then the reply's
tokens behind it, as if it had generated them. Held to the words by a grammar it would cut them into
other pieces than its tokenizer does, and it takes none beside tools. Keepwarm is attached to it as
to any server.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from bareengine import ANSWER_S, BareEngine
from keepwarm.api.responses import chat_form

Message = dict[str, Any]
# The reply to a chat body, as a message of chat's.
Script = Callable[[Mapping[str, Any]], Message]

_SCRIPTED = {"/v1/chat/completions": "chat", "/v1/responses": "responses"}
_PROBE = "Quartz"


@contextmanager
def scripted(engine: BareEngine, script: Script) -> Iterator[str]:
    """The address at which the engine answers by a script."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(engine, script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(engine: BareEngine, script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._passed()

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path in _SCRIPTED:
                self._reply(_SCRIPTED[path], json.loads(raw))
            else:
                self._passed(raw)

        def log_request(self, *_: object) -> None:
            pass

        def _reply(self, api: str, body: Mapping[str, Any]) -> None:
            chat = chat_form(body) if api == "responses" else body
            message = script(chat)
            timings = _generate(engine, chat, message, slot=body.get("id_slot", -1))
            if api == "responses":
                whole = _response(message, timings)
                event = {"type": "response.completed", "response": whole, "timings": timings}
            else:
                whole = _completion(message, timings, streamed=False)
                event = _completion(message, timings, streamed=True)
            if not body.get("stream"):
                return self._send(json.dumps(whole).encode(), "application/json")
            data = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
            return self._send(data, "text/event-stream")

        def _send(self, data: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(data)

        def _passed(self, raw: bytes | None = None) -> None:
            address = urlsplit(engine.base)
            connection = http.client.HTTPConnection(address.netloc, timeout=ANSWER_S)
            headers = {"Content-Type": "application/json"}
            connection.request(self.command, self.path, raw, headers)
            reply = connection.getresponse()
            data, kind = reply.read(), reply.headers.get("Content-Type", "application/json")
            connection.close()
            self._send(data, kind, reply.status)

    return Handler


def _generate(
    engine: BareEngine, chat: Mapping[str, Any], message: Message, *, slot: int
) -> dict[str, Any]:
    """Have the engine compute a prompt, and a reply behind it as its template writes it."""
    prompt = engine.post("/apply-template", dict(chat))["prompt"]
    tool = {"role": "tool", "tool_call_id": "x", "content": _PROBE}
    further = {**chat, "messages": [*chat["messages"], message, tool]}
    text = engine.post("/apply-template", further)["prompt"]
    assert text.startswith(prompt)
    # The token that ends a turn is generated and not computed.
    answered = text[: text.index("<|im_end|>", len(prompt))]

    def computed(words: str) -> dict[str, Any]:
        body = {"prompt": words, "n_predict": 0, "cache_prompt": True, "id_slot": slot}
        return dict(engine.post("/completion", body)["timings"])

    timings = computed(prompt)
    timings["predicted_n"] = computed(answered)["prompt_n"] + 1
    return timings


def _finish(message: Message) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _completion(message: Message, timings: Mapping[str, Any], *, streamed: bool) -> dict[str, Any]:
    said: dict[str, Any] = dict(message)
    if streamed and "tool_calls" in said:
        said["tool_calls"] = [{**c, "index": i} for i, c in enumerate(said["tool_calls"])]
    choice = {"index": 0, "finish_reason": _finish(message)}
    choice["delta" if streamed else "message"] = said  # type: ignore[assignment]
    kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {"object": kind, "choices": [choice], "timings": dict(timings)}


def _response(message: Message, timings: Mapping[str, Any]) -> dict[str, Any]:
    output: list[dict[str, Any]] = []
    if thought := message.get("reasoning_content"):
        part = {"type": "reasoning_text", "text": thought}
        output.append({"type": "reasoning", "content": [part], "summary": []})
    if text := _text(message.get("content")):
        part = {"type": "output_text", "text": text}
        output.append({"type": "message", "role": "assistant", "content": [part]})
    output += [
        {"type": "function_call", "call_id": call["id"], **call["function"]}
        for call in message.get("tool_calls", ())
    ]
    cached, prefilled = timings["cache_n"], timings["prompt_n"]
    usage = {
        "input_tokens": cached + prefilled,
        "output_tokens": timings["predicted_n"],
        "input_tokens_details": {"cached_tokens": cached},
    }
    return {"object": "response", "status": "completed", "output": output, "usage": usage}


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return str(content or "")
