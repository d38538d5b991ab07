"""The blocks that change in agents' prompts: taken by their form, whole, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from keepwarm.core.hygiene import Kind, hygiene_of
from keepwarm.core.moved_blocks import is_agent, take_blocks

STATUS = """\
gitStatus: This is the git status at the start of the conversation. Note that this status is a \
snapshot in time, and will not update during the conversation.

Current branch: main

Main branch (you will usually use this for PRs): main

Status:
M src/app.py
?? notes.txt

Recent commits:
1a2b3c4 Add the parser
9f8e7d6 Begin"""
CLAUDE = """\

You are an interactive agent that helps users with software engineering tasks.

# Memory

You have a persistent file-based memory at `/home/ann/.claude/projects/-home-ann-shop/memory/`. \
This directory already exists. Each memory is one file, with frontmatter:

```markdown
name: {{a name}}
 - Path: /home/joe/shop
 - Kept: yes
```

# Environment
You have been invoked in the following environment:
 - Primary working directory: /home/ann/shop
 - Is a git repository: true
 - Platform: linux
 - OS Version: Linux 6.18
 - You are powered by the model local.

# Session guidance
Look at what is there first."""
OPENCODE = """\
You are powered by the model named local.
Here is some useful information about the environment you are running in:
<env>
  Working directory: /home/ann/shop
  Workspace root folder: /home/ann/shop
  Is directory a git repo: yes
  Today's date: Sat Nov 28 2026
</env>
Skills provide specialized instructions."""
PI = """\
You are a coding assistant.
- Main documentation: /opt/pi/README.md
- Additional docs: /opt/pi/docs
Current date: 2026-11-28
Current working directory: /home/ann/shop"""
PI_NEWER = """\
You are a coding assistant.
</docs>

<cwd>
/home/ann/shop
</cwd>"""
QWEN = """\
You are Qwen Code.

Git snapshot at conversation start. Prefer live git commands.
```text
git: Current branch: main
git: Status:
git: M src/app.py
git: ?? notes.txt
git: Recent commits:
git: 1a2b3c4 Add the parser
```

---

You have two memory directories.

- USER memory: `/home/ann/.qwen/memories`
- PROJECT memory (private to you): `/home/ann/.qwen/projects/-home-ann-shop/memory`

Be brief.

## /home/ann/.qwen/memories/MEMORY.md

It likes tea.

## /home/ann/.qwen/projects/-home-ann-shop/memory/MEMORY.md

The shop sells tea."""


def in_another_place(text: str) -> str:
    """The same prompt on another day, in another directory of another repository."""
    changed = text.replace("/home/ann/shop", "/srv/bakery").replace("-home-ann-shop", "-srv-bakery")
    changed = changed.replace(
        "git: 1a2b3c4 Add the parser", "git: 0fedcba Bake\ngit: abcdef0 Knead"
    )
    changed = changed.replace("1a2b3c4 Add the parser", "0fedcba Bake\nabcdef0 Knead")
    changed = changed.replace("M src/app.py\n?? notes.txt", "(clean)").replace("28", "29")
    changed = changed.replace("git: ?? notes.txt\n", "").replace("sells tea", "sells bread")
    return changed.replace("branch: main", "branch: oven")


@pytest.mark.parametrize(
    ("prompt", "blocks"),
    [
        (f"{CLAUDE}\n\n{STATUS}", 3),
        (OPENCODE, 1),
        (PI, 1),
        (PI_NEWER, 1),
        (QWEN, 3),
        (f"{PI}\n\n{STATUS}", 2),
    ],
    ids=["claude", "opencode", "pi", "newer pi", "qwen", "both"],
)
def test_what_is_left_is_the_same_in_every_directory(prompt: str, blocks: int) -> None:
    here, there = take_blocks([prompt]), take_blocks([in_another_place(prompt)])
    assert here.texts == there.texts
    assert len(here.blocks) == len(there.blocks) == blocks
    assert here.blocks != there.blocks


@pytest.mark.parametrize("prompt", [f"{CLAUDE}\n\n{STATUS}", OPENCODE, PI, PI_NEWER, QWEN])
def test_every_word_is_kept_or_taken_and_taking_twice_is_taking_once(prompt: str) -> None:
    taken = take_blocks([prompt])
    assert sorted(" ".join([*taken.texts, *taken.blocks]).split()) == sorted(prompt.split())
    assert take_blocks(taken.texts) == (taken.texts, [])


def test_a_status_is_taken_from_its_head_to_its_last_commit() -> None:
    taken = take_blocks([f"{CLAUDE}\n\n{STATUS}"])
    assert STATUS in taken.blocks
    assert taken.texts[0].endswith("Look at what is there first.")


def test_a_list_in_an_example_stays() -> None:
    assert " - Path: /home/joe/shop\n - Kept: yes" in take_blocks([CLAUDE]).texts[0]


def test_the_words_that_announce_an_element_go_with_it() -> None:
    taken = take_blocks([OPENCODE])
    assert taken.blocks[0].startswith("Here is some useful information")
    assert taken.texts[0].count("\n") == 1


def test_where_documentation_lies_is_no_block() -> None:
    assert "- Main documentation: /opt/pi/README.md" in take_blocks([PI]).texts[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "You are terse.",
        "Name: Ann\nRole: cook",
        "Commits:\n1a2b3c4 one",
        "<env>\nBe brief.\n</env>",
        "<example>\nName: Ann\n</example>",
        "```text\nlog: one\nlog: two\n```",
        "Read `/etc/hosts` first.",
        "Opened: 9 to 5\n\nStatus:\nopen\n\nRecent commits:\nnone, so far.",
        "Current date: 2026-11-28",
    ],
)
def test_other_texts_keep_every_character(text: str) -> None:
    assert take_blocks([text]) == ([text], [])


@pytest.mark.parametrize(
    "text",
    [
        "- Place: /home/ann\n- Kind: shop\n\n" * 40,
        "Rules first.\n" + "Opened: 2026-11-28\n" * 40,
        "Kept in `/home/x/-a-b/c` and more. " * 40,
    ],
)
def test_a_document_of_many_such_lines_keeps_every_character(text: str) -> None:
    assert take_blocks([text]) == ([text], [])


def test_only_a_prompt_with_an_agents_tools_is_an_agents() -> None:
    assert is_agent({"Bash", "Read", "Edit"})
    assert is_agent({"read", "bash", "edit", "write"})
    assert is_agent({"run_shell_command", "read_file"})
    assert is_agent({"grep_search", "read_file", "tool_search"})
    assert not is_agent({"get_weather", "bash"})
    assert not is_agent(())


def request(kind: Kind, prompt: str, *tools: str) -> dict[str, Any]:
    asked = "What does it do?"
    if kind == "messages":
        parts = [{"type": "text", "text": "<system-reminder>x</system-reminder>"}]
        parts.append({"type": "text", "text": asked})
        return {
            "system": [{"type": "text", "text": "You are it."}, {"type": "text", "text": prompt}],
            "messages": [{"role": "user", "content": parts}],
            "tools": [{"name": name, "input_schema": {}} for name in tools],
        }
    functions = [{"type": "function", "function": {"name": name}} for name in tools]
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": asked}]
    return {"messages": messages, "tools": functions}


def clean(kind: Kind, body: dict[str, Any], **options: bool) -> Any:
    cleaner = hygiene_of(["move-known"], [])
    assert cleaner
    before = copy.deepcopy(body)
    out = cleaner.clean(kind, body, **options)
    assert body == before, "the client's body was changed in place"
    return out


def test_blocks_stand_before_the_question_and_behind_the_reminders() -> None:
    out = clean("messages", request("messages", f"{CLAUDE}\n\n{STATUS}", "Bash", "Read"))
    reminder, question = out.body["messages"][0]["content"]
    assert reminder["text"] == "<system-reminder>x</system-reminder>"
    assert question["text"].endswith("\n\nWhat does it do?")
    assert STATUS in question["text"]
    assert out.rewrites == {"move-known": 3}


def test_in_a_chat_they_stand_before_the_first_question_only() -> None:
    body = request("chat", PI, "read", "bash")
    body["messages"] += [
        {"role": "assistant", "content": "It sells."},
        {"role": "user", "content": "And then?"},
    ]
    out = clean("chat", body)
    assert out.body["messages"][1]["content"] == (
        "Current date: 2026-11-28\nCurrent working directory: /home/ann/shop\n\nWhat does it do?"
    )
    assert out.body["messages"][2:] == body["messages"][2:]


def test_a_system_message_behind_the_first_question_goes_to_the_beginning() -> None:
    body = request("messages", "You are it.", "Bash", "Read")
    env = " - Primary working directory: /home/ann/shop\n - Is a git repository: true"
    later = {"role": "system", "content": f"Tools are deferred.\n{env}\nAgents follow."}
    last = {"role": "system", "content": "A later one."}
    answer = {"role": "assistant", "content": "It sells."}
    body["messages"] += [later, answer, {"role": "user", "content": "And then?"}, last]
    out = clean("messages", body)
    assert out.rewrites == {"move-known": 2}
    first, *rest = out.body["messages"]
    assert first["content"] == [
        {
            "type": "text",
            "text": "Tools are deferred.\nAgents follow.\n\n<system-reminder>x</system-reminder>",
        },
        {"type": "text", "text": f"{env.strip()}\n\nWhat does it do?"},
    ]
    assert rest == [answer, {"role": "user", "content": "And then?"}, last]
    again = hygiene_of(["move-known"], [])
    assert again
    assert again.clean("messages", out.body).body is out.body


def test_who_isnt_an_agent_or_counts_characters_is_left_alone() -> None:
    for body in (request("chat", PI, "get_weather"), request("chat", PI)):
        assert clean("chat", body).body is body
    body = request("chat", PI, "read", "bash")
    assert clean("chat", body, keeps_text=True).body is body


META = '{\n  "message_id": "1467012345",\n  "at": "2026-11-28T10:22:31Z",\n  "chat": "kitchen"\n}'


@pytest.mark.parametrize("block", [META, f"```json\n{META}\n```", '{"message_id": 12}'])
def test_metadata_in_json_at_the_end_goes_behind_the_last_question(block: str) -> None:
    cleaner = hygiene_of(["move-volatile"], [])
    assert cleaner
    body = request("chat", f"You are it.\n\n## Context\n{block}\n")
    body["messages"] += [
        {"role": "assistant", "content": "It sells."},
        {"role": "user", "content": "And then?"},
    ]
    out = cleaner.clean("chat", body)
    assert out.rewrites == {"move-volatile": 1}
    assert out.body["messages"][0]["content"] == "You are it.\n\n## Context"
    assert out.body["messages"][1] == body["messages"][1]
    assert out.body["messages"][-1]["content"] == f"And then?\n\n{block}"
    assert cleaner.clean("chat", out.body).body is out.body


@pytest.mark.parametrize(
    "end",
    [
        '{"name": "an example", "kind": "tool"}',
        "{not json, id_1}",
        '{"message_id": 1}\nBe brief.',
        '["2026-11-28"]',
    ],
)
def test_json_that_says_something_else_or_stands_elsewhere_stays(end: str) -> None:
    cleaner = hygiene_of(["move-volatile"], [])
    assert cleaner
    body = request("chat", f"You are it.\n{end}")
    assert cleaner.clean("chat", body).body is body
