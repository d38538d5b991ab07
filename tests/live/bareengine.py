"""A bare engine: the real server without Keepwarm around it, started, asked and ended by a test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHILD = Path(__file__).with_name("engine_child.py")
ANSWER_S = 120.0

# What leaves every decision about slots to the test.
BARE: dict[str, Any] = {
    "n_parallel": 4,
    "n_ctx": 4096,
    "cache_ram_mib": 0,
    "cache_idle_slots": False,
    "slot_prompt_similarity": 0.0,
    "fit_params": False,
    "cpuparams.n_threads": 2,
    "verbosity": 0,
}

Logprobs = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Reply:
    """What a completion reused, what it said, and the top logprobs of each token."""

    cache_tokens: int
    token_ids: list[int]
    logprobs: Logprobs


@dataclass
class BareEngine:
    """A running engine. Its slots begin empty; files are in `slot_dir`."""

    process: subprocess.Popen[str]
    base: str
    slot_dir: Path
    slots: int
    streams: int
    log: Path
    files: int = field(default=0)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.base + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        found: list[int] = self.post("/tokenize", {"content": text})["tokens"]
        return found

    def fill(self, ids: list[int], *, slot: int) -> None:
        """Have the slot hold exactly these tokens."""
        body = {"prompt": ids, "n_predict": 0, "id_slot": slot, "cache_prompt": True}
        self.post("/completion", body)

    def ask(self, ids: list[int], *, slot: int, tokens: int = 4) -> Reply:
        """Continue these tokens at temperature 0."""
        found = self.post(
            "/completion",
            {
                "prompt": ids,
                "n_predict": tokens,
                "id_slot": slot,
                "cache_prompt": True,
                "temperature": 0,
                "n_probs": 5,
            },
        )
        said = found["completion_probabilities"]
        return Reply(
            found["timings"]["cache_n"],
            [token["id"] for token in said],
            [[(p["id"], p["logprob"]) for p in token["top_logprobs"]] for token in said],
        )

    def save(self, slot: int) -> bytes:
        """The slot's file."""
        self.files += 1
        name = f"saved-{self.files}"
        self.post(f"/slots/{slot}?action=save", {"filename": name})
        path = self.slot_dir / name
        data = path.read_bytes()
        path.unlink()
        return data

    def restore(self, data: bytes, *, slot: int) -> None:
        """Put a file's state into the slot; urllib.error.HTTPError when it is refused."""
        self.files += 1
        path = self.slot_dir / f"restored-{self.files}"
        path.write_bytes(data)
        try:
            self.post(f"/slots/{slot}?action=restore", {"filename": path.name})
        finally:
            path.unlink()

    def clear(self) -> None:
        """Empty all slots."""
        for slot in range(self.slots):
            self.post(f"/slots/{slot}?action=erase", {})


StartEngine = Callable[..., BareEngine]


def start_engine(model: Path, slot_dir: Path, params: dict[str, Any]) -> BareEngine:
    """Start the server with these parameters over `BARE`; dots in names are written `__`."""
    log = slot_dir.parent / f"{slot_dir.name}.log"
    named = {name.replace("__", "."): value for name, value in params.items()}
    asked = BARE | {"port": _free_port()} | named
    asked |= {"model.path": str(model), "slot_save_path": f"{slot_dir}/"}
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
        )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("listening "):
            break
    else:
        process.wait()
        pytest.fail(f"the engine didn't start:\n{log.read_text()[-2000:]}")
    slots = asked["n_parallel"]
    return BareEngine(
        process,
        line.split()[1],
        slot_dir,
        slots,
        1 if asked.get("kv_unified") else slots,
        log,
    )


def end_engine(engine: BareEngine) -> None:
    """End the process, whatever it is doing."""
    process = engine.process
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
