"""A coding agent's prompt is learned the first time it is sent, and warm in the next life."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from served import Served

pytestmark = pytest.mark.live

AGENT = "claude-cli/2.1.332"


def request(doing: str, question: str) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": f"You {doing} people who look after disks. " * 60},
        {"role": "user", "content": question},
    ]
    return {"messages": messages, "max_tokens": 2, "temperature": 0}


def pins(served: Served) -> list[str]:
    extents = served.get("/keepwarm/store")["extents"]
    return [name for extent in extents for name in extent["pins"]]


def test_an_agents_prompt_is_learned_the_first_time_and_warm_in_the_next_life(
    tmp_path: Path, quick_model: Path, small_tiers: Path
) -> None:
    def serve() -> Served:
        return Served(
            tmp_path,
            engine={"model": str(quick_model), "slots": 2, "context": 4096, "threads": 1},
            tiers={"dir": str(small_tiers)},
            hygiene={"rules": ["move-known"]},
        ).wait_ready()

    served = serve()
    try:
        for agent, doing in ((f"{AGENT} (external)", "help"), ("curl/8.1", "sing")):
            body = request(doing, "Is it there?")
            assert served.post("/v1/chat/completions", body, user_agent=agent).status == 200
            served.settled()
        served.until(lambda: AGENT in pins(served), seconds=20)
        assert "learned" not in pins(served), "somebody else's prompt is learned the second time"
        listed = Served.command("store", "ls", "--store", str(tmp_path / "store"), root=tmp_path)
        assert AGENT in listed.stdout
        engine = served.engine_pid
        served.kill()
        os.kill(engine, 9)
        served = serve()
        answer = served.post("/v1/chat/completions", request("help", "Another day?"))
        assert answer.cached >= answer.body["usage"]["prompt_tokens"] - 30
    finally:
        served.stop()
