"""TLS and Unix sockets, on both sides; and whoever sends no HTTP, or never gets to its end."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from fakeengine import KEY, FakeEngine
from rig import Keepwarm

from keepwarm.engine.client import EngineClient
from keepwarm.errors import ConfigError
from keepwarm.gateway import door, listening
from keepwarm.gateway.listening import HttpRunner, listen
from keepwarm.operate.gateway_client import Gateway
from keepwarm.settings import ServerSettings

CHAT = "/v1/chat/completions"


async def hello(_: web.Request) -> web.Response:
    return web.json_response({"said": "hello"})


@asynccontextmanager
async def listening_at(settings: ServerSettings) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/", hello)
    app.router.add_get("/keepwarm/status", hello)
    runner = HttpRunner(app)
    await runner.setup()
    try:
        yield await listen(runner, settings)
    finally:
        await runner.cleanup()


async def said_by(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        return str((await response.json())["said"])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate of its own."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return key, certificate


async def test_a_certificate_makes_it_https(pair: tuple[Path, Path]) -> None:
    key, certificate = pair
    settings = ServerSettings(port=0, ssl_key_file=str(key), ssl_cert_file=str(certificate))
    async with listening_at(settings) as url:
        assert url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate))
        connector = aiohttp.TCPConnector(ssl=trusted)
        async with aiohttp.ClientSession(connector=connector) as session:
            assert await said_by(session, url) == "hello"
    broken = ServerSettings(port=0, ssl_key_file=str(certificate), ssl_cert_file=str(key))
    for bad in (broken, ServerSettings(port=0, ssl_key_file=str(key))):
        with pytest.raises(ConfigError):
            async with listening_at(bad):
                pass


async def test_a_path_makes_it_a_socket_of_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "keepwarm.sock"
    settings = ServerSettings(host=str(path))
    for _ in range(2):
        async with listening_at(settings) as url:
            assert url == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            connector = aiohttp.UnixConnector(str(path))
            async with aiohttp.ClientSession(connector=connector) as session:
                assert await said_by(session, "http://localhost/") == "hello"
            with pytest.raises(ConfigError, match="listens"):
                async with listening_at(settings):
                    pass
        # What a killed server leaves.
        server = await asyncio.start_unix_server(lambda *_: None, path)
        server.close()
        assert path.is_socket() or not path.exists()


@pytest.mark.parametrize("form", ["{}", "unix:{}"])
async def test_commands_ask_a_gateway_behind_a_socket(tmp_path: Path, form: str) -> None:
    path = tmp_path / "keepwarm.sock"
    named = form.format(path)
    async with listening_at(ServerSettings(host=str(path))), Gateway(named, None) as gateway:
        assert await gateway.get("status") == {"said": "hello"}


async def test_a_file_is_no_socket_to_take_over(tmp_path: Path) -> None:
    path = tmp_path / "notes.sock"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="socket"):
        async with listening_at(ServerSettings(host=str(path))):
            pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}", "{}"])
async def test_an_attached_server_may_be_behind_a_socket(
    engine: FakeEngine, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "llama.sock"
    assert engine._runner
    await web.UnixSite(engine._runner, path).start()
    client = EngineClient(form.format(path), api_key=KEY)
    assert (await client.props())["build_info"] == "fake-1"


async def exchange(keepwarm: Keepwarm, raw: bytes, *, seconds: float = 10) -> bytes:
    """What comes back for some bytes until the server closes the connection."""
    host, _, port = keepwarm.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        async with asyncio.timeout(seconds):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n{}",
    ],
    ids=["words", "version", "header", "tls", "length"],
)
async def test_what_isnt_http_is_refused_in_json(keepwarm: Keepwarm, raw: bytes) -> None:
    head, _, body = (await exchange(keepwarm, raw)).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"505")
    assert b"application/json" in head
    assert json.loads(body)["error"]["message"]


async def test_broken_chunks_are_refused_in_json(keepwarm: Keepwarm) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await exchange(keepwarm, head + b"zz\r\nhello\r\n")
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    packed = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n"
    packed += b"Content-Length: 5\r\nConnection: close\r\n\r\nhello"
    answer = await exchange(keepwarm, packed)
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_a_body_that_never_ends_is_cut_off(
    keepwarm: Keepwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_BODY_S", 0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n"
    answer = await exchange(keepwarm, head + b"Connection: close\r\n\r\n{", seconds=15)
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    await keepwarm.settled()


async def test_a_head_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_HEAD_S", 0.5)
    async with listening_at(ServerSettings(port=0)) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        ("GET /health HTTP/1.0", (200,)),
        ("GET /health HTTP/1.1\r\nHost: a\r\nExpect: the-unexpected", (200,)),
        ("OPTIONS * HTTP/1.1\r\nHost: a", (204, 400, 404)),
        ("CONNECT example.org:443 HTTP/1.1\r\nHost: a", (400, 404)),
        ("TRACE / HTTP/1.1\r\nHost: a", (404,)),
        ("BREW /v1/models HTTP/1.1\r\nHost: a", (400, 404)),
        ("PUT /v1/chat/completions HTTP/1.1\r\nHost: a", (404,)),
        ("GET http://example.org/v1/models HTTP/1.1\r\nHost: a", (200, 400, 404)),
        ("GET /v1/models HTTP/1.1\r\nHost: a\r\nUpgrade: websocket", (200, 400)),
        ("GET /caf\u00e9 HTTP/1.1\r\nHost: a", (400, 404)),
        ("GET /tokenize?\u00e9 HTTP/1.1\r\nHost: a", (400, 404)),
    ],
)
async def test_odd_requests_are_answered_in_json(
    keepwarm: Keepwarm, head: str, statuses: tuple[int, ...]
) -> None:
    raw = (head + "\r\nConnection: close\r\n\r\n").encode()
    top, _, body = (await exchange(keepwarm, raw)).partition(b"\r\n\r\n")
    assert int(top.split()[1]) in statuses
    assert not body or json.loads(body)
