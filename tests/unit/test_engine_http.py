"""HTTP to the engine, against a socket that answers with exactly these bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field

import pytest

from keepwarm.engine.http import EngineHttp
from keepwarm.errors import ConfigError, EngineDownError

OK = b"HTTP/1.1 200 OK\r\n"


@dataclass
class Server:
    """Answers each connection with the same pieces, then closes it."""

    pieces: list[bytes]
    port: int = 0
    asked: bytes = b""
    written: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked = await reader.readuntil(b"\r\n\r\n")
        try:
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                self.written += len(piece)
                await asyncio.sleep(0.001)
        except ConnectionError:
            self.left.set()
        writer.close()


@asynccontextmanager
async def serving(*pieces: bytes) -> AsyncIterator[Server]:
    told = Server(list(pieces))
    server = await asyncio.start_server(told.answer, "127.0.0.1", 0)
    told.port = server.sockets[0].getsockname()[1]
    async with server:
        yield told


async def fetched(url: str, method: str = "GET") -> tuple[int, bytes]:
    with closing(await EngineHttp(url).request(method, "/x", headers={})) as response:
        return response.status, await response.read()


async def test_a_body_is_read_by_its_length_wherever_it_is_cut() -> None:
    whole = OK + b"Content-Length: 5\r\nX-Twice: a\r\nx-twice: b\r\n\r\nhello"
    for cut in range(1, len(whole)):
        async with serving(whole[:cut], whole[cut:]) as server:
            sent = EngineHttp(server.url).request("GET", "/x", headers={})
            with closing(await sent) as response:
                assert await response.read() == b"hello"
                assert response.headers.getall("X-TWICE") == ["a", "b"]


async def test_chunks_come_one_by_one_and_end() -> None:
    head = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(head, b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n") as server:
        with closing(await EngineHttp(server.url).request("GET", "/x", headers={})) as response:
            assert response.is_stream
            pieces = [await response.read_some()]
            while pieces[-1]:
                pieces.append(await response.read_some())
    assert pieces[0] == b"one"
    assert b"".join(pieces) == b"onetwo"


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async with serving(OK + b"\r\n", b"all ", b"of it") as server:
        assert await fetched(server.url) == (200, b"all of it")


async def test_the_length_in_an_answer_to_head_is_not_waited_for() -> None:
    async with serving(OK + b"Content-Length: 5000\r\n\r\n") as server:
        assert await fetched(server.url, "HEAD") == (200, b"")


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\nContent-"],
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [OK + b"Content-Length: 5\r\n\r\n", b"hel"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"3\r\none\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"],
    ],
    ids=["nothing", "half of the head", "no HTTP", "half of the body", "no last chunk", "garbage"],
)
async def test_an_answer_that_breaks_off_is_never_taken_for_whole(pieces: list[bytes]) -> None:
    async with serving(*pieces) as server:
        with pytest.raises(EngineDownError, match="broke off"):
            await fetched(server.url)


async def test_what_came_before_it_broke_off_is_given_first() -> None:
    async with serving(OK + b"Content-Length: 9\r\n\r\n", b"half") as server:
        with closing(await EngineHttp(server.url).request("GET", "/x", headers={})) as response:
            assert await response.read_some() == b"half"
            with pytest.raises(EngineDownError):
                await response.read_some()
            with pytest.raises(EngineDownError):
                await response.read_some()


async def test_a_go_on_is_no_answer_yet() -> None:
    going = b"HTTP/1.1 100 Continue\r\nX-Going: on\r\n\r\n"
    async with serving(going, OK + b"Content-Length: 2\r\n\r\nhi") as server:
        with closing(await EngineHttp(server.url).request("POST", "/x", headers={})) as response:
            assert (response.status, await response.read()) == (200, b"hi")
            assert "X-Going" not in response.headers


async def test_nobody_listening_is_told_at_once() -> None:
    async with serving() as server:
        url = server.url
    with pytest.raises(EngineDownError, match="can't be reached"):
        await fetched(url)


async def test_lines_are_whole_even_the_last() -> None:
    async with serving(OK + b"\r\n", b"a\nb", b"c\n\nd") as server:
        with closing(await EngineHttp(server.url).request("GET", "/x", headers={})) as response:
            assert [line async for line in response.lines()] == [b"a", b"bc", b"", b"d"]


async def test_the_key_and_the_address_own_path_go_with_every_request() -> None:
    async with serving(OK + b"Content-Length: 0\r\n\r\n") as server:
        http = EngineHttp(server.url + "/llama/", api_key="secret")
        sent = http.request("POST", "/v1/x?y=1", headers={"X-Own": "z"}, body=b"{}")
        with closing(await sent) as response:
            assert response.status == 200
    lines = server.asked.decode().split("\r\n")
    assert lines[0] == "POST /llama/v1/x?y=1 HTTP/1.1"
    assert "Authorization: Bearer secret" in lines
    assert {"X-Own: z", "Content-Length: 2", "Connection: close"} <= set(lines)


async def test_an_engine_is_made_to_wait_for_a_reader_that_is_slower() -> None:
    piece = b"x" * (1 << 20)
    head = OK + f"Content-Length: {len(piece) * 64}\r\n\r\n".encode()
    async with serving(head, *[piece] * 64) as server:
        with closing(await EngineHttp(server.url).request("GET", "/x", headers={})) as response:
            await asyncio.sleep(0.3)
            assert server.written < len(piece) * 32
            assert len(await response.read()) == len(piece) * 64


async def test_closing_a_reply_ends_it_for_the_engine() -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    async with serving(head, *[b"3\r\none\r\n"] * 10_000) as server:
        response = await EngineHttp(server.url).request("GET", "/x", headers={})
        assert await response.read_some()
        response.close()
        async with asyncio.timeout(5):
            await server.left.wait()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "localhost:8080", "", "ftp://x", "http://x:y"])
def test_what_is_no_url_of_a_server_is_said_so(url: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8080"):
        EngineHttp(url)


@dataclass
class Counting:
    """A server that counts connections, and answers one request on each."""

    port: int = 0
    opened: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.writers.append(writer)
        try:
            await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        writer.write(OK + b"Content-Length: 2\r\n\r\nok")
        writer.close()

    async def until_opened(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.opened < count:  # noqa: ASYNC110 - another task counts
                await asyncio.sleep(0.001)


@asynccontextmanager
async def counting() -> AsyncIterator[Counting]:
    told = Counting()
    server = await asyncio.start_server(told.answer, "127.0.0.1", 0)
    told.port = server.sockets[0].getsockname()[1]
    async with server:
        yield told


async def asked(http: EngineHttp, method: str = "POST") -> bytes:
    with closing(await http.request(method, "/x", headers={})) as response:
        return await response.read()


async def test_the_next_connection_is_opened_behind_a_reply_and_used() -> None:
    async with counting() as server:
        http = EngineHttp(server.url, opens_ahead=True)
        for count in (2, 3):
            assert await asked(http) == b"ok"
            await server.until_opened(count)
        http.close()


@pytest.mark.parametrize(("opens_ahead", "method"), [(False, "POST"), (True, "GET")])
async def test_nothing_is_opened_ahead_for_a_foreign_server_or_behind_a_look(
    opens_ahead: bool, method: str
) -> None:
    async with counting() as server:
        http = EngineHttp(server.url, opens_ahead=opens_ahead)
        assert await asked(http, method) == b"ok"
        await asyncio.sleep(0.05)
        assert server.opened == 1
        http.close()


async def test_a_connection_that_was_closed_or_has_waited_long_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with counting() as server:
        http = EngineHttp(server.url, opens_ahead=True)
        assert await asked(http) == b"ok"
        await server.until_opened(2)
        server.writers[-1].close()
        await asyncio.sleep(0.05)
        assert await asked(http) == b"ok"
        await server.until_opened(4)
        monkeypatch.setattr("keepwarm.engine.http._AHEAD_S", 0.0)
        assert await asked(http) == b"ok"
        await server.until_opened(6)
        http.close()


async def test_what_was_opened_ahead_is_closed_at_the_end() -> None:
    async with counting() as server:
        http = EngineHttp(server.url, opens_ahead=True)
        await asked(http)
        await server.until_opened(2)
        await asyncio.sleep(0.01)
        http.close()
        assert http._ahead is None
        await asked(http)
        await asyncio.sleep(0.05)
        assert server.opened == 3
