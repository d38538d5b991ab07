"""Real clients, started by `keepwarm run`: nothing fails, and only what is new is prefilled.

Each has a task, goes on with it, begins a new session, and does both again after gateway and engine
were killed. On the model of random weights tokens are counted; on one that can call tools, where it
has been fetched, everything must work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from served import Served

TIMEOUT_S = 900
CODER = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
# Behind a prompt that was there before, a turn's own tokens: the question, the reply, what is moved
# in front of the question, and the template's around them. Measured, with room for a version.
NEW_TOKENS = 1200
TASK = "Name the files here in one line."
NEXT = "Which of them is the largest?"
OTHER = "Say hello in one word."


@dataclass(frozen=True)
class Ways:
    """A client's arguments for a task, for going on with it, and for a new session."""

    task: list[str]
    go_on: list[str]
    new: list[str]


WAYS = {
    "pi": Ways(
        ["--offline", "-p", TASK], ["--offline", "-c", "-p", NEXT], ["--offline", "-p", OTHER]
    ),
    "codex": Ways(
        ["exec", "--skip-git-repo-check", TASK],
        ["exec", "--skip-git-repo-check", "resume", "--last", NEXT],
        ["exec", "--skip-git-repo-check", OTHER],
    ),
    "opencode": Ways(["run", TASK], ["run", "--continue", NEXT], ["run", OTHER]),
    "qwen": Ways(["-p", TASK], ["--continue", "-p", NEXT], ["-p", OTHER]),
    "claude": Ways(["-p", TASK], ["--continue", "-p", NEXT], ["-p", OTHER]),
    "aider": Ways(
        ["--message", TASK], ["--restore-chat-history", "--message", NEXT], ["--message", OTHER]
    ),
}
SHORT_REPLIES = """\
- name: openai/local
  edit_format: whole
  extra_params: {max_tokens: 64}
"""
QUIET = {
    "AIDER_ANALYTICS": "false",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_YES_ALWAYS": "true",
    "AIDER_AUTO_COMMITS": "false",
    "AIDER_GITIGNORE": "false",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_TELEMETRY": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "PI_OFFLINE": "1",
    "QWEN_TELEMETRY_ENABLED": "false",
}


@dataclass(frozen=True)
class Step:
    """What one run of a client came to, by the gateway's own account of its requests."""

    step: str
    requests: int
    prompt_tokens: int
    prefilled_tokens: int
    first_s: float


class Place:
    """A project of git's in a home of its own, and a gateway with an empty store."""

    def __init__(self, root: Path, model: Path, tiers: Path, programs: Path) -> None:
        self.root, self.programs = root, programs
        self.project = root / "home" / "project"
        self.project.mkdir(parents=True)
        self.settings = {
            "engine": {"model": str(model), "slots": 2, "context": 65536, "pool": "shared"},
            "tiers": {"dir": str(tiers)},
            "hygiene": {"rules": ["drop-billing", "move-known"]},
        }
        template = Path("configs/chat-templates/chatml-tools.jinja").absolute()
        if model.name != CODER:
            self.settings["engine"]["chat_template"] = str(template)
            # Aider ends a reply in which one chunk comes a hundred times, and asks again.
            (root / "home" / ".aider.model.settings.yml").write_text(SHORT_REPLIES)
        self.seen: set[str] = set()
        for name in ("app.py", "notes.md"):
            (self.project / name).write_text(f"# {name}\n" * 3)
        self.git("init", "--quiet")
        self.commit("Begin")
        self.served = self.serve()

    def serve(self) -> Served:
        copied = {name: dict(section) for name, section in self.settings.items()}
        return Served(self.root / "keepwarm", **copied).wait_ready()

    def git(self, *words: str) -> None:
        who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
        subprocess.run(["git", *who, *words], cwd=self.project, check=True, capture_output=True)

    def commit(self, text: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", text)

    def crash(self) -> None:
        """SIGKILL for gateway and engine, and both again."""
        engine = self.served.engine_pid
        self.served.settled()
        self.served.kill()
        with suppress(ProcessLookupError):
            os.kill(engine, 9)
        self.served = self.serve()

    def run(self, step: str, client: str, arguments: list[str]) -> Step:
        """One run of a client to its end; fails with what it said if it does."""
        home = self.root / "home"
        places = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
        keepwarm = [sys.executable, "-m", "keepwarm", "run", client, "--url", self.served.base]
        done = subprocess.run(
            [*keepwarm, "--", *arguments],
            cwd=self.project,
            env={**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", **QUIET, **places},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        assert done.returncode == 0, said
        self.served.settled()
        records = self._records()
        assert records, said
        for record in records:
            assert record["error"] is None, record
            assert record["status"] == 200, record
        tokens = [record["tokens"] for record in records]
        return Step(
            step,
            len(records),
            sum(token["prompt"] for token in tokens),
            sum(token["cold"] for token in tokens),
            round(records[0]["timing"]["ttft_s"] or 0.0, 2),
        )

    def _records(self) -> list[dict[str, Any]]:
        """Records of the requests since the last look, oldest first."""
        brief = self.served.get("/keepwarm/requests?limit=200")["requests"]
        fresh = [one["id"] for one in brief if one["id"] not in self.seen]
        self.seen |= set(fresh)
        return [self.served.get(f"/keepwarm/requests/{one}") for one in reversed(fresh)]


@pytest.fixture(params=["random", "coder"])
def model(request: pytest.FixtureRequest, random_model: Path) -> Path:
    if request.param == "random":
        return random_model
    coder = Path(".cache/models").absolute() / CODER
    if not coder.is_file():
        pytest.skip(f"no {coder}")
    return coder


@pytest.fixture
def place(tmp_path: Path, model: Path, small_tiers: Path, programs: Path) -> Iterator[Place]:
    place = Place(tmp_path, model, small_tiers, programs)
    yield place
    place.served.stop()


@pytest.mark.parametrize("client", WAYS)
def test_a_client_works_and_only_what_is_new_is_prefilled(place: Place, client: str) -> None:
    if shutil.which(client, path=str(place.programs)) is None:
        pytest.skip(f"{client} isn't installed")
    ways = WAYS[client]
    steps = [place.run("a task", client, ways.task)]
    steps.append(place.run("goes on", client, ways.go_on))
    steps.append(place.run("a new session", client, ways.new))
    (place.project / "app.py").write_text("print('hello')\n")
    place.commit("Say hello")
    steps.append(place.run("a new session after a commit", client, ways.new))
    place.crash()
    steps.append(place.run("goes on after SIGKILL", client, ways.go_on))
    steps.append(place.run("a new session after SIGKILL", client, ways.new))
    report = os.environ.get("KEEPWARM_CLIENTS_REPORT")
    if report:
        with Path(report).open("a", encoding="utf-8") as sink:
            name = Path(place.settings["engine"]["model"]).name
            row = {"client": client, "model": name, "steps": [asdict(step) for step in steps]}
            sink.write(json.dumps(row) + "\n")
    for step in steps[1:]:
        assert step.prefilled_tokens <= NEW_TOKENS * step.requests, steps
