"""Everything a person can get wrong at the start: one paragraph, a status, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from served import Served
from smalltiers import write_small_tiers

MISSING = "/nowhere/at/all"


class Place:
    """A directory to run in, and what was in it before."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tiers = write_small_tiers(root / "tiers")
        self.model = root / "model.gguf"
        # A header that is fine as far as it is read: no tensors, one architecture.
        key, value = b"general.architecture", b"llama"
        self.model.write_bytes(
            b"GGUF"
            + (3).to_bytes(4, "little")
            + (0).to_bytes(8, "little")
            + (1).to_bytes(8, "little")
            + len(key).to_bytes(8, "little")
            + key
            + (8).to_bytes(4, "little")
            + len(value).to_bytes(8, "little")
            + value
        )

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}

    def fails(self, *arguments: str, settings: str = "", **environment: str) -> str:
        """What `serve` says on stderr when it refuses; it must leave no trace."""
        if settings:
            (self.root / "keepwarm.toml").write_text(settings)
        before = self.files()
        done = Served.command(
            *("serve", "--tiers", str(self.tiers), "--store", str(self.root / "store")),
            *("--port", "0", *arguments),
            root=self.root,
            **environment,
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert self.files() == before, "something was left behind"
        said = done.stderr.partition("error: ")[2].strip()
        assert said, f"no error is told: {done.stderr}"
        assert "\n\n" not in said, "it is more than one paragraph"
        assert said[-1] in ".)", "it isn't a sentence"
        return " ".join(said.split())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def with_model(place: Place) -> tuple[str, str]:
    return "--model", str(place.model)


def test_no_model_at_all(place: Place) -> None:
    said = place.fails()
    assert "No model is given" in said
    assert "--model" in said


def test_a_missing_model(place: Place) -> None:
    said = place.fails("--model", f"{MISSING}/model.gguf")
    assert f"{MISSING}/model.gguf" in said
    assert "No such file" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no header"),
        (b"GGUF", "has no header"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF model"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(100), "GGUF version 9"),
    ],
    ids=["empty", "short", "zip", "version"],
)
def test_a_file_that_is_no_model(place: Place, content: bytes, expected: str) -> None:
    place.model.write_bytes(content)
    assert expected in place.fails(*with_model(place))


def test_a_model_that_is_cut_in_its_header(place: Place) -> None:
    whole = place.model.read_bytes()
    place.model.write_bytes(whole[:-3])
    said = place.fails(*with_model(place))
    assert "truncated or damaged" in said
    assert "Fetch the file again" in said


def test_a_directory_for_a_model(place: Place) -> None:
    assert str(place.tiers) in place.fails("--model", str(place.tiers))


def test_a_tier_that_extends_itself(place: Place) -> None:
    manifest = place.tiers / "standard" / "tier.toml"
    manifest.write_text(manifest.read_text().replace('"minimal"', '"standard"'))
    said = place.fails(*with_model(place))
    assert "standard" in said
    assert "extends" in said


def test_tools_that_arent_json(place: Place) -> None:
    (place.tiers / "minimal" / "tools.json").write_text('[\n{"type": "function",\n]')
    said = place.fails(*with_model(place))
    assert "tools.json, line 3" in said


def test_a_port_in_use(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = place.fails(*with_model(place), "--port", str(port))
    assert f"Port {port}" in said
    assert "--port" in said


def test_an_open_door(place: Place) -> None:
    for host in ("0.0.0.0", "::", "127.example.org"):
        said = place.fails(*with_model(place), "--host", host)
        assert "API key" in said
        assert "timing" in said


def test_a_missing_key_file(place: Place) -> None:
    said = place.fails(*with_model(place), settings=f'[server]\napi_key_file = "{MISSING}"\n')
    assert MISSING in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("[engine]\nslot = 3\n", "slot"),
        ("[engine]\nslots = 0\n", "engine.slots"),
        ('[engine]\nslots = "four"\n', "engine.slots"),
        ('[engine]\npool = "big"\n', "engine.pool"),
        ("[sever]\nport = 1\n", "sever"),
        ("engine = 3\n", "engine"),
        ("[engine\n", "TOML"),
    ],
    ids=["unknown", "bound", "type", "word", "section", "shape", "syntax"],
)
def test_a_setting_that_cant_be_used(place: Place, settings: str, expected: str) -> None:
    said = place.fails(*with_model(place), settings=settings)
    assert expected in said
    assert "keepwarm.toml" in said


def test_an_environment_variable_that_cant_be_used(place: Place) -> None:
    said = place.fails(*with_model(place), KEEPWARM_ENGINE_SLOTS="many")
    assert "KEEPWARM_ENGINE_SLOTS" in said
    assert "whole number" in said


def test_a_settings_file_that_isnt_there(place: Place) -> None:
    assert MISSING in place.fails(*with_model(place), "--config", MISSING)


def test_a_missing_chat_template(place: Place) -> None:
    assert MISSING in place.fails(*with_model(place), "--chat-template", MISSING)


def test_tiers_that_arent_there(place: Place) -> None:
    assert MISSING in place.fails(*with_model(place), "--tiers", MISSING)


def test_a_binary_that_isnt_there_or_cant_run(place: Place) -> None:
    said = place.fails(*with_model(place), "--engine", MISSING)
    assert MISSING in said
    script = place.root / "llama-server"
    script.write_text("no program")
    assert "executed" in place.fails(*with_model(place), "--engine", str(script))


def test_arguments_for_a_binary_that_isnt_named(place: Place) -> None:
    assert "--engine" in place.fails(*with_model(place), "--", "-ngl", "99")


def test_an_upstream_and_a_model_at_once(place: Place) -> None:
    said = place.fails(*with_model(place), "--upstream", "http://127.0.0.1:1")
    assert "--upstream" in said
    assert "--model" in said


def test_an_upstream_without_its_slot_directory(place: Place) -> None:
    said = place.fails("--upstream", "http://127.0.0.1:1")
    assert "--slot-dir" in said
    assert "--slot-save-path" in said


def test_a_slot_directory_that_isnt_there(place: Place) -> None:
    said = place.fails("--upstream", "http://127.0.0.1:1", "--slot-dir", MISSING)
    assert MISSING in said


def test_an_upstream_where_nobody_listens(place: Place) -> None:
    slots = place.root / "slots"
    slots.mkdir()
    said = place.fails("--upstream", "http://127.0.0.1:1", "--slot-dir", str(slots))
    assert "http://127.0.0.1:1" in said


# A server that answers just as much as an attached one is asked for at the start.
Answers = Callable[[str, dict[str, Any]], tuple[int, Any]]


def props() -> dict[str, Any]:
    return {"total_slots": 2, "default_generation_settings": {"n_ctx": 4096}, "build_info": "b1"}


def answers(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/props":
        return 200, props()
    if path == "/tokenize":
        return 200, {"tokens": [1, 2, 3, 4]}
    if path == "/completion":
        return 200, {"timings": {"cache_n": 0, "prompt_n": 4}}
    return 200, {"status": "ok", "n_saved": 4, "n_written": 100}


@pytest.fixture
def upstream() -> Iterator[Callable[[Answers], str]]:
    running: list[ThreadingHTTPServer] = []

    def start(answer: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(length)
                status, body = answer(self.path.split("?")[0], json.loads(raw or b"{}"))
                out = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

            do_POST = do_GET  # noqa: N815 - the name that the base class looks for

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_slot_directory_that_isnt_the_servers(
    place: Place, upstream: Callable[[Answers], str]
) -> None:
    slots = place.root / "slots"
    slots.mkdir()
    said = place.fails("--upstream", upstream(answers), "--slot-dir", str(slots))
    assert str(slots) in said
    assert "--slot-save-path" in said


def test_an_attached_server_that_saves_no_slots(
    place: Place, upstream: Callable[[Answers], str]
) -> None:
    def refusing(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.startswith("/slots/"):
            message = "This server does not support slots action. Start it with `--slot-save-path`"
            return 501, {"error": {"code": 501, "message": message, "type": "not_supported_error"}}
        return answers(path, body)

    slots = place.root / "slots"
    slots.mkdir()
    said = place.fails("--upstream", upstream(refusing), "--slot-dir", str(slots))
    assert "--slot-save-path" in said


def test_an_upstream_that_is_something_else(
    place: Place, upstream: Callable[[Answers], str]
) -> None:
    slots = place.root / "slots"
    slots.mkdir()
    page = upstream(lambda *_: (200, b"<html>welcome</html>"))
    said = place.fails("--upstream", page, "--slot-dir", str(slots))
    assert re.search(r"isn't JSON|llama-server", said)
    missing = upstream(lambda *_: (404, {"error": {"message": "not found"}}))
    said = place.fails("--upstream", missing, "--slot-dir", str(slots))
    assert missing in said or "llama-server" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cant_be_written(place: Place, upstream: Callable[[Answers], str]) -> None:
    slots = place.root / "slots"
    slots.mkdir()
    closed = place.root / "closed"
    closed.mkdir(mode=0o500)
    said = place.fails(
        *("--upstream", upstream(answers), "--slot-dir", str(slots)),
        *("--store", str(closed / "store")),
    )
    assert str(closed) in said
    shutil.rmtree(closed)
