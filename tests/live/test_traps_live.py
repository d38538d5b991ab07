"""llama-server's traps, sprung on purpose: caught, counted, and every client gets its answer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bareengine import BareEngine, StartEngine
from keepwarm.core.memory import MemoryKind
from keepwarm.deployment import deployment as deployment_module
from keepwarm.deployment.life import Life
from keepwarm.deployment.probe import ProbeResult, probe
from keepwarm.engine import http as http_module
from keepwarm.engine.client import EngineClient
from keepwarm.settings import EngineSettings, Places, Settings, StoreSettings, TierSettings
from served import Serve, Served
from tinymodels import small_model, write_tiny_gemma3

pytestmark = pytest.mark.live


class Meddler:
    """Stands between Keepwarm and the engine; when told to, it empties a slot after each restore.

    So the engine reports success, and prefills everything: what happens to a sliding-window
    model's file as the engine wrote it.
    """

    def __init__(self, engine: BareEngine) -> None:
        self.meddles = False
        self.restores = 0
        meddler = self

        class Handler(BaseHTTPRequestHandler):
            def handle(self) -> None:
                # A client that leaves in the middle of a stream is no fault of this one.
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def answer(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                reply = meddler.ask(engine.base + self.path, raw or None)
                with contextlib.closing(reply):
                    self.send_response(reply.status)
                    self.send_header("Content-Type", reply.headers["Content-Type"])
                    self.send_header("Connection", "close")
                    self.end_headers()
                    if meddler.meddles and "action=restore" in self.path:
                        meddler.restores += 1
                        meddler.ask(engine.base + self.path.replace("restore", "erase"), b"{}")
                    while chunk := reply.read1():
                        self.wfile.write(chunk)
                        self.wfile.flush()

            do_GET = do_POST = answer  # noqa: N815 - the names that the base class looks for

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def ask(self, url: str, raw: bytes | None) -> Any:
        request = urllib.request.Request(url, raw, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as error:
            return error

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def meddler(bare_engine: StartEngine) -> Iterator[tuple[Meddler, BareEngine]]:
    engine = bare_engine(small_model(), n_parallel=2, n_ctx=4096)
    meddler = Meddler(engine)
    yield meddler, engine
    meddler.stop()


def misses(served: Served) -> dict[str, float]:
    """The misses counted so far, by reason."""
    lines = re.findall(r'keepwarm_misses_total\{reason="(\w+)"\} (\S+)', served.read("/metrics"))
    return {reason: float(count) for reason, count in lines}


def test_a_restore_that_reports_success_and_prefills_everything_is_caught(
    serve: Serve, meddler: tuple[Meddler, BareEngine]
) -> None:
    between, engine = meddler
    served = serve(upstream=between.url, slot_dir=str(engine.slot_dir))
    served.occupy()
    between.meddles = True
    answer = served.ask("Is the disk there?", model="standard")
    between.meddles = False
    assert between.restores == 1
    # The client has its answer, only later.
    assert answer.status == 200
    assert answer.text
    assert answer.plan == "snapshot"
    assert answer.cached == 0
    served.until(lambda: misses(served) == {"not_reused": 1.0})
    # Its files are what was written: nothing is thrown away, and it is warm again by itself.
    served.settled()
    assert quarantined(served) == 0
    served.occupy()
    again = served.ask("And now?", model="standard")
    assert again.plan == "snapshot"
    assert again.cached > 100
    assert misses(served) == {"not_reused": 1.0}
    served.stop()


def quarantined(served: Served) -> int:
    return int(served.get("/keepwarm/status")["store"]["quarantined_extents"])


def test_a_slot_that_was_emptied_behind_our_back_is_noticed_and_only_slower(
    serve: Serve,
) -> None:
    served = serve(model=str(small_model()), slots=2, context=4096)
    engine = served.get("/keepwarm/status")["engine_url"]
    for slot in (0, 1):
        request = urllib.request.Request(f"{engine}/slots/{slot}?action=erase", b"{}")
        urllib.request.urlopen(request, timeout=60).read()
    answer = served.ask("Is the disk there?", model="minimal")
    assert answer.status == 200
    assert answer.plan == "slot"
    assert answer.cached == 0
    served.until(lambda: misses(served) == {"slot_lost": 1.0})
    served.settled()
    # The snapshot is sound: it isn't blamed.
    assert quarantined(served) == 0
    served.occupy()
    assert served.ask("And now?", model="minimal").cached >= 60
    served.stop()


def test_a_server_with_its_own_defaults_is_served_from_all_the_same(
    serve: Serve, bare_engine: StartEngine
) -> None:
    # What a plain `llama-server` does by itself: it clears idle slots, and chooses among them.
    engine = bare_engine(
        small_model(),
        kv_unified=True,
        cache_idle_slots=True,
        cache_ram_mib=256,
        slot_prompt_similarity=0.1,
    )
    served = serve(upstream=engine.base, slot_dir=str(engine.slot_dir))
    for number in range(6):
        tier = ("minimal", "standard")[number % 2]
        answer = served.ask(f"Question {number}: is the disk there?", model=tier)
        assert answer.status == 200
        assert answer.text
        served.settled()
    served.stop()


def test_a_server_that_shifts_moved_chunks_does_not_do_so_for_keepwarm(
    serve: Serve, bare_engine: StartEngine
) -> None:
    engine = bare_engine(small_model(), n_parallel=1, n_cache_reuse=32)
    rules = "Name the disk, then the hour, then the reason why. " * 12
    held = engine.tokenize(f"Monday. Rain is expected in the whole of the north. {rules}")
    asked = engine.tokenize(f"Monday. {rules}")
    common = next(i for i, (a, b) in enumerate(zip(held, asked, strict=False)) if a != b)
    assert common < 8

    # By itself the server moves the rules to where they are now, and calls them cached.
    engine.fill(held, slot=0)
    assert engine.ask(asked, slot=0).cache_tokens > len(asked) // 2

    served = serve(upstream=engine.base, slot_dir=str(engine.slot_dir))
    cached = []
    for prompt in (held, asked):
        answer = served.post("/completion", {"prompt": prompt, "n_predict": 4, "n_cache_reuse": 32})
        assert answer.status == 200
        cached.append(answer.body["timings"]["cache_n"])
    assert cached[1] <= common
    served.stop()


def test_the_engine_answers_on_a_connection_that_was_opened_seconds_ahead(
    bare_engine: StartEngine,
) -> None:
    # What Keepwarm counts on when it opens the next request's connection behind a reply.
    address = urllib.parse.urlsplit(bare_engine(small_model()).base)
    with socket.create_connection((address.hostname, address.port), timeout=30) as waiting:
        time.sleep(http_module._AHEAD_S)
        waiting.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert waiting.recv(64).startswith(b"HTTP/1.1 200")


def whole_only(client: EngineClient, slot_dir: Path, **kwargs: Any) -> Any:
    """A probe that doesn't understand the file, so that the engine's own is restored as it is."""

    async def run() -> ProbeResult:
        found = await probe(client, slot_dir, **kwargs)
        return ProbeResult(
            MemoryKind.SLIDING_WINDOW, None, found.streams, found.row_bytes, "unknown"
        )

    return run()


async def test_a_window_that_cant_be_mended_is_kept_whole_by_the_engine_instead(
    tmp_path: Path, small_tiers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: this engine, this model, and a file that wasn't touched."""
    model = tmp_path / "gemma3.gguf"
    write_tiny_gemma3(model, small_model())
    monkeypatch.setattr(deployment_module, "probe", whole_only)
    settings = Settings(
        engine=EngineSettings(model=str(model), slots=2, context=2048, threads=2, pool="split"),
        store=StoreSettings(dir=str(tmp_path / "store"), staging_dir=str(tmp_path / "staging")),
        tiers=TierSettings(dir=str(small_tiers)),
    )
    life = Life(settings, Places(tmp_path, tmp_path, None, None))
    await life.start()
    try:
        assert life.deployment.launch.options
        assert life.deployment.launch.options.swa_full
        assert [w.proved for w in life.deployment.prefixes.warmed] == [True, True]
    finally:
        await life.stop()


def test_a_model_that_is_cut_in_its_tensors_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = tmp_path / "cut.gguf"
    whole = small_model().read_bytes()
    model.write_bytes(whole[: len(whole) * 2 // 3])
    done = Served.command(
        *("serve", "--model", str(model), "--store", str(tmp_path / "store"), "--port", "0"),
        root=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback (most" not in done.stderr.partition("error: ")[0]
    assert "truncated" in done.stderr
    assert "Fetch the file again" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_template_that_drops_the_tools_is_an_error_that_says_how_to_give_another(
    tmp_path: Path, small_tiers: Path
) -> None:
    tiers = tmp_path / "tiers"
    (tiers / "minimal").mkdir(parents=True)
    for name in ("tier.toml", "system.md"):
        (tiers / "minimal" / name).write_text((small_tiers / "minimal" / name).read_text())
    function = {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}
    function["parameters"] = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": function}]
    (tiers / "minimal" / "tools.json").write_text(json.dumps(tools))
    done = Served.command(
        *("serve", "--model", str(small_model()), "--tiers", str(tiers), "--port", "0"),
        *("--store", str(tmp_path / "store")),
        root=tmp_path,
    )
    assert done.returncode == 1
    assert "drops the tools" in done.stderr
    assert "--chat-template" in done.stderr
    assert "chatml-tools.jinja" in done.stderr


def test_a_store_that_another_keepwarm_uses_is_an_error_that_names_it(serve: Serve) -> None:
    served = serve(model=str(small_model()), slots=1, context=1024)
    done = Served.command(
        *("serve", "--model", str(small_model()), "--slots", "1", "--context", "1024"),
        *("--tiers", str(served.root.parent / "none"), "--port", "0"),
        root=served.root.parent,
    )
    assert "is not a directory of tiers" in done.stderr
    said = (served.root / "keepwarm.toml").read_text()
    tiers = re.findall(r'^dir = "(.*tiers.*)"$', said, re.MULTILINE)
    done = Served.command(
        *("serve", "--model", str(small_model()), "--slots", "1", "--context", "1024"),
        *("--tiers", str(tiers[0]), "--store", str(served.root / "store"), "--port", "0"),
        root=served.root.parent,
    )
    assert done.returncode == 1
    assert f"pid {served.process.pid}" in done.stderr
    served.settled()
    assert served.ask("Still there?", model="minimal").cached >= 60
    served.stop()


def test_staging_that_is_too_small_for_a_tier_leaves_it_unsaved_and_says_so(
    serve: Serve, tmp_path: Path
) -> None:
    served = serve(
        model=str(small_model()),
        slots=1,
        context=1024,
        store={"staging_bytes": 1 << 20},
    )
    said = served.log.read_text()
    assert "raise store.staging_bytes" in said
    assert "Traceback" not in said
    served.stop()
