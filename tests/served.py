"""A real `keepwarm serve` in a process of its own, started, asked and ended by a test."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keepwarm.engine.process import free_port

ANSWER_S = 300.0
READY_S = 300.0


@dataclass(frozen=True)
class Answer:
    """One whole reply: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: Any

    @property
    def plan(self) -> str:
        return self.headers["x-keepwarm-plan"]

    @property
    def cached(self) -> int:
        """Prompt tokens that were reused."""
        return int(self.body["timings"]["cache_n"])

    @property
    def prefilled(self) -> int:
        """Prompt tokens that were computed for it, those of a fill ahead of it included."""
        ahead = int(self.headers.get("x-keepwarm-filled", 0))
        return int(self.body["timings"]["prompt_n"]) + ahead

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"]["content"])

    @property
    def logprobs(self) -> list[tuple[str, float, list[tuple[str, float]]]]:
        """Each token with its logprob and its rivals'."""
        return [
            (t["token"], t["logprob"], [(o["token"], o["logprob"]) for o in t["top_logprobs"]])
            for t in self.body["choices"][0]["logprobs"]["content"]
        ]


class Served:
    """A running `keepwarm serve`. Make it, `wait_ready`, ask, `stop` or `kill`."""

    def __init__(
        self, root: Path, *, environment: dict[str, str] | None = None, **settings: dict[str, Any]
    ) -> None:
        """Start it with these sections of settings; its store and logs are below `root`."""
        self.root = root
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = root / "keepwarm.log"
        root.mkdir(parents=True, exist_ok=True)
        tree = {
            "engine": {"threads": 2, **settings.pop("engine", {})},
            "server": {"port": self.port, **settings.pop("server", {})},
            "store": {
                "dir": str(root / "store"),
                "staging_dir": str(root / "staging"),
                **settings.pop("store", {}),
            },
            **settings,
        }
        file = root / "keepwarm.toml"
        file.write_text(_toml(tree))
        self.key = next(iter(tree["server"].get("api_keys", [])), "").rpartition(":")[2]
        home = {"HOME": str(root), "XDG_CONFIG_HOME": str(root), "XDG_STATE_HOME": str(root)}
        with self.log.open("a") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "keepwarm", "serve", "--config", str(file)],
                env={**os.environ, **home, **(environment or {})},
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )

    @staticmethod
    def command(
        *arguments: str, root: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `keepwarm` with these arguments to its end, at home in `root`."""
        home = {"HOME": str(root), "XDG_CONFIG_HOME": str(root), "XDG_STATE_HOME": str(root)}
        return subprocess.run(
            [sys.executable, "-m", "keepwarm", *arguments],
            env={**os.environ, **home, "COLUMNS": "1000", **environment},
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )

    def wait_ready(self) -> Served:
        """Wait until everything is warm; a server that ends before that fails the test."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"keepwarm ended:\n{self.log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.base}/health", timeout=5):
                    return self
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        pytest.fail(f"keepwarm wasn't ready in time:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        self.process.terminate()
        try:
            status = self.process.wait(60)
            assert status == 0, f"it ended with {status}: {self.log.read_text()[-3000:]}"
        finally:
            self.process.kill()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    @property
    def engine_pid(self) -> int:
        return int(self.get("/keepwarm/status")["engine_pid"])

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def read(self, path: str, *, key: str | None = None) -> str:
        request = urllib.request.Request(self.base + path, headers=self._headers(key))
        with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
            return str(reply.read().decode())

    def metric(self, line_start: str) -> float:
        """The sum of the metrics' lines that start so."""
        lines = [li for li in self.read("/metrics").splitlines() if li.startswith(line_start)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def post(
        self, path: str, body: dict[str, Any], *, key: str | None = None, **more: str
    ) -> Answer:
        """One request; `more` are headers, with `_` for `-`."""
        headers = {k.replace("_", "-"): v for k, v in more.items()}
        request = urllib.request.Request(
            self.base + path, json.dumps(body).encode(), headers=self._headers(key) | headers
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
                told = {k.lower(): v for k, v in reply.headers.items()}
                return Answer(reply.status, told, json.load(reply))
        except urllib.error.HTTPError as error:
            told = {k.lower(): v for k, v in error.headers.items()}
            raw = error.read()
            return Answer(error.code, told, json.loads(raw) if raw else None)

    def chat(self, *messages: dict[str, Any], key: str | None = None, **body: Any) -> Answer:
        """A chat request at temperature 0."""
        asked = {"messages": list(messages), "max_tokens": 8, "temperature": 0, **body}
        return self.post("/v1/chat/completions", asked, key=key)

    def ask(self, text: str, **body: Any) -> Answer:
        """A question to a tier (`model`), or to the bare model."""
        return self.chat({"role": "user", "content": text}, **body)

    def stream(self, body: dict[str, Any]) -> Stream:
        """A streamed chat request, read by its caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        raw = json.dumps({"temperature": 0, **body, "stream": True})
        connection.request("POST", "/v1/chat/completions", raw, self._headers())
        return Stream(connection, connection.getresponse())

    def occupy(self) -> None:
        """Give every slot to a conversation of its own: all are open at the same time."""
        slots = len(self.get("/slots"))
        streams = []
        for number in range(slots):
            messages = [{"role": "user", "content": f"{number} is the number of this talk. " * 6}]
            body = {"messages": messages, "max_tokens": 400, "ignore_eos": True}
            stream = self.stream(body)
            next(stream.events())
            streams.append(stream)
        for stream in streams:
            stream.hang_up()
        self.settled()

    def at_once(self, *calls: Any) -> list[Any]:
        """Results of calls that run at the same time."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    def busy_slots(self) -> int:
        """Slots in which the engine computes."""
        return sum(bool(slot["is_processing"]) for slot in self.get("/slots"))

    def settled(self) -> None:
        """Wait until no slot is given out or computed in."""
        self.until(lambda: all(s["state"] == "idle" for s in self.get("/keepwarm/status")["slots"]))
        self.until(lambda: not self.busy_slots())

    def until(self, condition: Any, *, seconds: float = 60.0) -> None:
        """Wait until something holds; a test that waits for ever fails."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"it didn't come to that:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.03)

    def _headers(self, key: str | None = None) -> dict[str, str]:
        key = self.key if key is None else key
        out = {"Content-Type": "application/json"}
        return out | {"Authorization": f"Bearer {key}"} if key else out


Serve = Callable[..., Served]


@dataclass
class Stream:
    """A streamed reply."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON events, as they come."""
        for line in self.response:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                yield json.loads(line[5:])

    def hang_up(self) -> None:
        """Close the connection in the middle of it."""
        self.response.close()
        self.connection.close()


def pid_runs(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def _toml(tree: dict[str, dict[str, Any]]) -> str:
    out = []
    for section, values in tree.items():
        out.append(f"[{section}]")
        # JSON's strings, numbers, booleans and lists are TOML's too.
        out += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(out) + "\n"
