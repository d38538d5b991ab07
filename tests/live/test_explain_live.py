"""Each cause of a miss produced for real with the real engine, and named; told to nobody else."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keepwarm.store.files import FileKey
from keepwarm.tiers.files import packaged_configs
from served import Answer, Serve, Served
from tinymodels import small_model, write_tiny_lfm2

pytestmark = pytest.mark.live

ALICE, BOB, CAROL = "alice-key", "bob-key", "carol-key"
RULES = "Always answer with the name of the disk, the hour and one short reason. " * 8
TEMPLATE = packaged_configs() / "chat-templates" / "chatml-tools.jinja"

# A template as some are: what it renders for the last user turn it renders otherwise later, it
# leaves reasoning out of earlier replies, and an argument of the request changes its first line.
MOODY_TEMPLATE = """\
{%- if mode is defined -%}
{{- '<|im_start|>system\\nMode ' + mode + '.<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if moody is defined and m.role == 'user' and loop.last -%}{{- 'Now: ' -}}{%- endif -%}
{{- m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -}}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(answer: Answer) -> dict[str, Any]:
    return {"role": "assistant", "content": answer.text}


def tool(name: str) -> dict[str, Any]:
    properties = {
        "path": {"type": "string", "description": "Which file or directory is meant"},
        "depth": {"type": "integer", "description": "How many levels below it"},
    }
    function = {
        "name": name,
        "description": f"Used to {name} something on the server, quickly and quietly.",
        "parameters": {"type": "object", "properties": properties, "required": ["path"]},
    }
    return {"type": "function", "function": function}


TOOLS = [tool("mount"), tool("copy"), tool("check")]


def explained(served: Served, answer: Answer, key: str | None = None) -> dict[str, Any]:
    """The record of an answered request."""
    assert answer.status == 200, answer.body
    path = f"/keepwarm/requests/{answer.headers['x-keepwarm-request-id']}"
    headers = served._headers(key)
    reply = read(served, path, headers)
    record = dict(json.loads(reply))
    tokens = record["tokens"]
    sources = ("slot", "snapshot", "shared", "cold")
    assert sum(tokens[source] for source in sources) == tokens["prompt"]
    assert tokens["prompt"] == answer.cached + answer.body["timings"]["prompt_n"]
    return record


def read(served: Served, path: str, headers: dict[str, str]) -> str:
    import urllib.request  # noqa: PLC0415 - the helper's own way, with another key

    request = urllib.request.Request(served.base + path, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(reply.read().decode())


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: Path, quick_model: Path
) -> Iterator[Served]:
    """One Keepwarm for the module, which keeps text, with three tenants."""
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={
            "model": str(quick_model),
            "threads": 1,
            "slots": 2,
            "context": 4096,
            "pool": "split",
            "chat_template": str(TEMPLATE),
        },
        server={"api_keys": [f"alice:{ALICE}", f"bob:{BOB}", f"carol:{CAROL}"]},
        tiers={"dir": str(small_tiers)},
        log={"prompts": True},
    ).wait_ready()
    yield served
    served.stop()


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> None:
    """Each test of the common server begins on idle slots."""
    if "served" in request.fixturenames:
        request.getfixturevalue("served").settled()


def test_a_warm_tier_needs_no_cause(served: Served) -> None:
    record = explained(served, served.ask("Is it there?", model="standard"))
    assert (record["cause"], record["tier"]) == ("none", "standard")
    assert record["plan"] in ("slot", "snapshot")
    assert any(option["chosen"] for option in record["considered"])
    assert record["estimate"]["ttft_s"] > 0
    assert record["nearest"]["id"] == "tier:standard"


def test_new_text_behind_a_warm_prefix_is_called_so(served: Served) -> None:
    question = "Where is the disk with the pictures of last summer, and who has looked at it since?"
    record = explained(served, served.ask(question, model="standard"))
    assert record["cause"] == "new_text"
    assert record["tokens"]["cold"] < 40


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("timestamp", "It is 2026-11-24 09:00:00.", "It is 2026-11-24 09:05:00."),
        ("identifier", "Session sess_4f9a1c77e2b8d035.", "Session sess_91bb02d6a7c34e58."),
        ("environment", "Work in /srv/alpha/data.", "Work in /srv/omega/data."),
        ("text_changed", "Be friendly.", "Be formal."),
    ],
)
def test_a_change_at_the_top_of_the_system_text_is_named(
    served: Served, name: str, before: str, after: str
) -> None:
    served.chat(system(f"{before} {RULES}"), user("Is it there?"))
    served.settled()
    record = explained(served, served.chat(system(f"{after} {RULES}"), user("Is it there?")))
    difference = record["difference"]
    assert record["cause"] == name
    assert (difference["where"], difference["index"], difference["name"]) == (
        "message",
        0,
        "system",
    )
    assert difference["before"] in before
    assert difference["after"] in after
    assert difference["before"] != difference["after"]
    assert record["tokens"]["cold"] > 80
    assert record["advice"]


def reordered(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changed = copy.deepcopy(tools)
    parameters = changed[1]["function"]["parameters"]
    parameters["properties"] = dict(reversed(parameters["properties"].items()))
    return changed


@pytest.mark.parametrize(
    ("name", "tools", "index", "which"),
    [
        ("key_order", reordered(TOOLS), 1, "copy"),
        ("tool_added", [TOOLS[0], tool("unmount"), *TOOLS[1:]], 1, "unmount"),
        ("tool_removed", [TOOLS[0], TOOLS[2]], 1, "copy"),
        ("tool_order", [TOOLS[0], TOOLS[2], TOOLS[1]], 1, "check"),
        ("tool_changed", [TOOLS[0], tool("copy") | {"x-note": "new"}, TOOLS[2]], 1, "copy"),
    ],
)
def test_a_change_of_the_tools_is_named(
    served: Served, name: str, tools: list[dict[str, Any]], index: int, which: str
) -> None:
    if name == "tool_changed":
        tools = copy.deepcopy(TOOLS)
        tools[1]["function"]["description"] = "Copies. " * 12
    # Its own text, so that the parameters' runs don't find each other's prompts.
    rules = f"For {name}: {RULES}"
    served.chat(system(rules), user("Is it there?"), tools=TOOLS)
    served.settled()
    record = explained(served, served.chat(system(rules), user("Is it there?"), tools=tools))
    difference = record["difference"]
    assert record["cause"] == name
    assert (difference["where"], difference["index"], difference["name"]) == ("tool", index, which)
    assert record["tokens"]["cold"] > 20


def conversation(served: Served, about: str) -> list[dict[str, Any]]:
    """Three turns that are warm in a slot."""
    turns = [system(f"{about} {RULES}"), user(f"Tell me about {about} and all that hangs off it.")]
    turns.append(said(served.chat(*turns, max_tokens=24)))
    turns.append(user("And who has used it since?"))
    turns.append(said(served.chat(*turns, max_tokens=24)))
    served.settled()
    return turns


def test_a_continued_conversation_is_new_text_only(served: Served) -> None:
    turns = conversation(served, "the tape drive")
    question = "Name the three that have used it most, in the order of their first use."
    record = explained(served, served.chat(*turns, user(question)))
    assert record["cause"] == "new_text"
    assert record["difference"] is None


def test_an_edited_earlier_turn_is_named(served: Served) -> None:
    turns = conversation(served, "the mail relay")
    turns[1] = user("Tell me about the mail relay and nothing that hangs off it.")
    record = explained(served, served.chat(*turns, user("Go on.")))
    assert record["cause"] == "history_changed"
    assert record["difference"]["index"] == 1
    assert "all" in record["difference"]["before"]


def test_left_out_turns_are_named(served: Served) -> None:
    turns = conversation(served, "the web page")
    record = explained(served, served.chat(turns[0], *turns[3:], user("Go on.")))
    assert record["cause"] == "history_cut"
    assert record["difference"]["index"] == 1


def test_a_client_that_drops_the_reasoning_is_named(served: Served) -> None:
    turns = [system(f"Think. {RULES}"), user("Is the disk full?")]
    grammar = (
        'root ::= "<think>The disk has some room left, so it is not full.</think>No, it has room."'
    )
    answer = served.chat(*turns, grammar=grammar, max_tokens=40)
    assert "</think>" in answer.text
    bare = {"role": "assistant", "content": answer.text.partition("</think>")[2]}
    served.settled()
    record = explained(served, served.chat(*turns, bare, user("Are you sure of that?")))
    assert record["cause"] == "reasoning_dropped"
    assert record["difference"]["index"] == 2


def test_what_was_never_asked_is_called_so(served: Served) -> None:
    text = "Vous traduisez des recettes de cuisine, ligne par ligne, sans rien ajouter. " * 6
    record = explained(served, served.chat(system(text), user("Une soupe.")))
    assert record["cause"] == "first_seen"
    assert record["nearest"] is None


def test_the_first_request_of_a_key_is_not_compared_with_other_keys(served: Served) -> None:
    asked = (system(f"Shared by nobody. {RULES}"), user("Is it there?"))
    served.chat(*asked)
    served.settled()
    answer = served.chat(*asked, key=CAROL)
    record = explained(served, answer, CAROL)
    assert record["cause"] == "new_namespace"
    assert record["nearest"] is None
    assert record["tokens"]["cold"] > 80


def test_requests_at_the_same_time_are_not_explained_by_each_other(served: Served) -> None:
    rules = system(f"Four at once. {RULES} {RULES}")
    questions = [user(f"Question {i}: {text}?") for i, text in enumerate("abcd")]
    answers = served.at_once(*[partial(served.chat, rules, question) for question in questions])
    records = [explained(served, answer) for answer in answers]
    cold = [record for record in records if record["tokens"]["cold"] > 200]
    assert len(cold) == 1  # it alone prefilled what all four begin with
    assert "evicted" not in {record["cause"] for record in records}
    others = {record["cause"] for record in records if record is not cold[0]}
    assert others <= {"new_text", "none"}


def test_a_key_sees_its_own_requests_only(served: Served) -> None:
    answer = served.chat(system(RULES), user("Is it mine?"), key=BOB)
    number = answer.headers["x-keepwarm-request-id"]
    assert explained(served, answer, BOB)["id"] == number
    listed = json.loads(read(served, "/keepwarm/requests?limit=500", served._headers(ALICE)))
    assert number not in {record["id"] for record in listed["requests"]}
    denied = subprocess.run(
        [sys.executable, "-m", "keepwarm", "explain", number, "--url", served.base],
        env={**os.environ, "KEEPWARM_API_KEY": ALICE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert denied.returncode == 1
    assert "no such request" in denied.stderr


def test_the_command_explains_and_needs_the_key(served: Served) -> None:
    served.chat(system(f"It is 09:00. {RULES}"), user("Is it there?"))
    served.settled()
    answer = served.chat(system(f"It is 09:01. {RULES}"), user("Is it there?"))
    number = answer.headers["x-keepwarm-request-id"]

    def keepwarm(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "keepwarm", *arguments, "--url", served.base]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    told = keepwarm("explain", number, "--key", ALICE)
    assert told.returncode == 0
    assert "a date or time changed" in told.stdout
    assert "09:01" in told.stdout
    last = json.loads(keepwarm("explain", "last", "--key", ALICE, "--json").stdout)
    assert last["id"] == number
    refused = keepwarm("explain", "last")
    assert refused.returncode == 1
    assert "asks for an API key" in refused.stderr
    top = keepwarm("top", "--key", ALICE)
    assert top.returncode == 0
    assert "slot 0" in top.stdout
    assert number[:8] in top.stdout


def test_top_follows_what_happens_until_it_is_interrupted(served: Served) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "keepwarm", "top", "--url", served.base, "--key", ALICE]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads
    )
    os.close(slave)
    screen: list[str] = []

    ready = select.poll()  # `select` itself takes no descriptor over 1,023
    ready.register(master, select.POLLIN)

    def shows(text: str) -> bool:
        while ready.poll(50):
            screen.append(os.read(master, 65536).decode(errors="replace"))
        return text in "".join(screen)

    try:
        served.until(lambda: shows("slot 0"))
        answer = served.ask("Do you see me?", model="minimal")
        number = answer.headers["x-keepwarm-request-id"]
        served.until(lambda: shows(number[:8]))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def evict_all(served: Served) -> None:
    """Evict by hand all that isn't a tier's."""

    def unpinned() -> list[dict[str, Any]]:
        extents = served.get("/keepwarm/store")["extents"]
        return [e for e in extents if not any(pin.startswith("tier:") for pin in e["pins"])]

    for extent in unpinned():
        served.post(f"/keepwarm/store/{extent['id']}/unpin", {})
    while left := unpinned():
        for extent in left:
            served.post(f"/keepwarm/store/{extent['id']}/evict", {})


def plain(serve: Serve, model: Path, **changes: Any) -> Served:
    """A Keepwarm without keys, quick to start."""
    engine: dict[str, Any] = {
        "model": str(model),
        "threads": 1,
        "slots": 2,
        "context": 4096,
        "pool": "split",
        "chat_template": str(TEMPLATE),
    }
    return serve(**(engine | changes), log={"prompts": True})


def test_an_eviction_and_a_restart_of_the_engine_are_told_apart(
    serve: Serve, quick_model: Path
) -> None:
    served = plain(serve, quick_model, slots=1)
    asked = (system(f"Evict me. {RULES}"), user("Is it there?"))
    other = (system(f"Quite other rules: {RULES.replace('disk', 'mast')}"), user("Is it up?"))
    served.chat(*asked)
    served.settled()
    served.chat(*other)
    served.settled()
    evict_all(served)
    record = explained(served, served.chat(*asked))
    assert record["cause"] == "evicted"
    assert record["tokens"]["cold"] > 80

    served.settled()
    evict_all(served)
    old = served.engine_pid
    os.kill(old, signal.SIGKILL)
    served.until(lambda: served.get("/keepwarm/status")["engine_pid"] not in (None, old))
    served.wait_ready()
    record = explained(served, served.chat(*asked))
    assert record["cause"] == "engine_restarted"


def test_a_snapshot_that_cannot_be_restored_is_named(serve: Serve, quick_model: Path) -> None:
    served = plain(serve, quick_model)
    asked = (system(f"Damage me. {RULES} {RULES}"), user("Is it there?"))
    served.chat(*asked)
    served.settled()
    served.until(lambda: len(served.get("/keepwarm/store")["extents"]) > 2)
    files = own_files(served)
    served.stop()
    for file in files:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        file.chmod(0o600)
        file.write_bytes(raw)
    again = plain(serve, quick_model)
    record = explained(again, again.chat(*asked))
    assert record["cause"] == "snapshot_failed"
    assert record["steps"]["failed_restore"] == "checksum"


def own_files(served: Served) -> list[Path]:
    """The payload files of what isn't a tier's."""
    extents = served.get("/keepwarm/store")["extents"]
    names = [FileKey(e["id"]).name for e in extents if not e["is_shared"]]
    files = [file for name in names for file in (served.root / "store").rglob(name)]
    assert len(files) == len(names) > 0
    return files


def test_another_template_is_another_fingerprint(
    serve: Serve, quick_model: Path, tmp_path: Path
) -> None:
    served = plain(serve, quick_model)
    asked = (system(f"Template. {RULES}"), user("Is it there?"))
    served.chat(*asked)
    served.stop()
    template = tmp_path / "other.jinja"
    template.write_text(TEMPLATE.read_text().replace("You may call", "You can call"))
    again = plain(serve, quick_model, chat_template=str(template))
    record = explained(again, again.chat(*asked))
    assert record["cause"] == "new_fingerprint"
    assert "changed: chat template" in record["summary"]


def test_what_a_template_does_to_the_history_is_named(
    serve: Serve, quick_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "moody.jinja"
    template.write_text(MOODY_TEMPLATE)
    served = plain(serve, quick_model, chat_template=str(template))

    # 1. It renders the last user turn otherwise than the same turn later.
    more = {"chat_template_kwargs": {"moody": True}}
    turns = [system("Be brief."), user(f"Read this. {RULES} {RULES}")]
    turns.append(said(served.chat(*turns, **more)))
    served.settled()
    record = explained(served, served.chat(*turns, user("And now?"), **more))
    assert record["cause"] == "template_rewrites"
    assert record["tokens"]["cold"] > 200

    # 2. It leaves out what the model has thought.
    thought = "The disk has some room left, so it is not full. " * 8
    grammar = f'root ::= "<think>{thought}</think>No, it has room."'
    turns = [system("Think first."), user("Is the disk full?")]
    reply = served.chat(*turns, grammar=grammar, max_tokens=900).body["choices"][0]["message"]
    assert "room left" in reply.get("reasoning_content", "") + reply["content"]
    turns.append(reply)
    served.settled()
    # Its reply is what must be prefilled again; the next question is long enough to see it.
    record = explained(served, served.chat(*turns, user(f"Are you sure? {RULES}")))
    assert record["cause"] == "reasoning_dropped"
    assert record["difference"] is None

    # 3. An argument of the request changes its first line.
    asked = (system(RULES), user("Is it there?"))
    served.chat(*asked, chat_template_kwargs={"mode": "night"})
    served.settled()
    record = explained(served, served.chat(*asked, chat_template_kwargs={"mode": "day"}))
    assert record["cause"] == "argument_changed"
    assert record["difference"]["name"] == "chat_template_kwargs"


def test_a_model_that_reuses_saved_ends_only_is_named(serve: Serve, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny_lfm2(model, small_model())
    served = plain(serve, model)
    served.chat(system(f"{RULES} {RULES} Be quick."), user("Is it there?"))
    served.settled()
    record = explained(
        served, served.chat(system(f"{RULES} {RULES} Be slow."), user("Is it there?"))
    )
    assert record["cause"] == "ends_only"


def test_without_leave_no_text_is_kept_anywhere(serve: Serve, quick_model: Path) -> None:
    served = serve(
        model=str(quick_model),
        threads=1,
        slots=2,
        context=4096,
        pool="split",
        chat_template=str(TEMPLATE),
        log={"level": "debug", "format": "json"},
    )
    secret = "the safe is behind the clock"
    served.chat(system(f"Note: {secret}. {RULES}"), user("Is it there?"))
    served.settled()
    record = explained(served, served.chat(system(f"Note: none. {RULES}"), user("Is it there?")))
    assert record["cause"] == "text_changed"
    assert record["difference"]["at_chars"] == len("Note: ")
    assert record["difference"]["before"] is None
    assert record["difference"]["before_hash"]
    served.stop()
    kept = [served.log, *(p for p in (served.root / "store").iterdir() if p.is_file())]
    assert any(p.name.startswith("requests.sqlite3") for p in kept)
    for file in kept:
        assert secret.encode() not in file.read_bytes(), file
