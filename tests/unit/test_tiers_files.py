"""Reading a directory of tiers: what is accepted, and where each error is said to be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from keepwarm.core.tiers import ContextRole, find_volatile
from keepwarm.errors import TierError
from keepwarm.tiers.files import find_tiers_directory, load_tiers, packaged_configs

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a thing.",
        "parameters": {
            "type": "object",
            "properties": {"zeta": {"type": "string"}, "alpha": {"type": "string"}},
            "required": ["zeta"],
        },
    },
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two tiers: `base`, and `more` with a tool and a context."""
    write(tmp_path / "base" / "tier.toml", 'description = "Base."\n')
    write(tmp_path / "base" / "system.md", "You are {agent_name}.\n")
    write(tmp_path / "more" / "tier.toml", 'description = "More."\nextends = "base"\n')
    write(tmp_path / "more" / "context.md", "More of it.\n")
    write(tmp_path / "more" / "tools.json", json.dumps([TOOL], indent=2))
    write(tmp_path / "README.md", "Not a tier.")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def refusal(directory: Path) -> str:
    with pytest.raises(TierError) as caught:
        load_tiers(directory, "Ada")
    return str(caught.value)


def test_a_directory_is_read_into_nested_tiers(directory: Path) -> None:
    tiers = load_tiers(directory, "Ada")
    assert tiers.names == ("base", "more")
    more = tiers.get("more")
    assert more is not None
    assert [m.text for m in more.messages] == ["You are Ada.", "More of it."]
    assert more.extends == "base"


def test_tools_keep_the_order_of_their_keys(directory: Path) -> None:
    more = load_tiers(directory, "Ada").get("more")
    assert more is not None
    assert json.dumps(more.tools[0]) == json.dumps(TOOL)


def test_settings_of_a_tier_are_read(directory: Path) -> None:
    write(
        directory / "more" / "tier.toml",
        'description = "More."\nextends = "base"\ncontext_role = "merge"\ndefault = true\n'
        'need_more = ["rules"]\n',
    )
    write(directory / "more" / "context.md", "Say NEED_MORE: rules")
    tiers = load_tiers(directory, "Ada")
    more = tiers.default
    assert more.name == "more"
    assert more.need_more == ("rules",)
    assert more.segments[-1].role is ContextRole.MERGE
    assert more.client_role is ContextRole.MERGE
    assert len(more.messages) == 1


def test_line_ends_and_a_byte_order_mark_make_no_other_prompt(directory: Path) -> None:
    write(directory / "base" / "system.md", "One.\nTwo.\n")
    before = load_tiers(directory, "Ada").default.messages
    (directory / "base" / "system.md").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.\r\n")
    assert load_tiers(directory, "Ada").default.messages == before


def test_hidden_folders_and_editors_copies_are_passed_over(directory: Path) -> None:
    write(directory / ".git" / "HEAD", "x")
    write(directory / "base" / "system.md~", "x")
    write(directory / "base" / ".system.md.swp", "x")
    assert load_tiers(directory, "Ada").names == ("base", "more")


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("more/tier.toml", 'description = "x"\nextend = "base"\n', ["unknown field `extend`"]),
        ("more/tier.toml", 'description = 3\nextends = "base"\n', ["`$.description`"]),
        ("more/tier.toml", 'extends = "base"\n', ["`description`"]),
        ("more/tier.toml", 'description = "x"\ncontext_role = "tool"\n', ["`$.context_role`"]),
        ("more/tier.toml", 'description = "x"\nneed_more = ["a b"]\n', ["`$.need_more[0]`"]),
        ("more/tier.toml", 'description = "x"\nextends = \n', ["line 2"]),
        ("more/tools.json", '[\n  {"type": "function",}\n]', ["line 2"]),
        ("more/tools.json", "[]", ["at least one tool"]),
        ("more/tools.json", '{"type": "function"}', ["JSON array"]),
        ("more/tools.json", '[\n\n{"type": "function"}]', ["line 3", "`function`"]),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_key_or_line(
    directory: Path, file: str, text: str, told: list[str]
) -> None:
    write(directory / file, text)
    message = refusal(directory)
    assert message.startswith(str(directory / file))
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("name", "look at", "name"),
        ("name", None, "name"),
        ("description", "", "description"),
        ("parameters", {"type": "array"}, "parameters.type"),
        (
            "parameters",
            {"type": "object", "properties": {}, "required": ["x"]},
            "look requires 'x'",
        ),
        ("arguments", {}, "unknown field `arguments`"),
    ],
)
def test_the_second_of_two_tools_is_told_by_its_line(
    directory: Path, key: str, value: object, told: str
) -> None:
    bad = json.loads(json.dumps(TOOL))
    bad["function"][key] = value
    text = f"[\n{json.dumps(TOOL).replace('look', 'see')},\n\n  {json.dumps(bad)}\n]"
    write(directory / "more" / "tools.json", text)
    message = refusal(directory)
    assert message.startswith(f"{directory / 'more' / 'tools.json'}, line 4:")
    assert told in message


def test_a_misspelt_file_is_refused_instead_of_left_out(directory: Path) -> None:
    (directory / "more" / "context.md").rename(directory / "more" / "contxt.md")
    message = refusal(directory)
    assert "contxt.md: not a file of a tier" in message
    assert "context.md" in message


@pytest.mark.parametrize(
    ("tier", "file", "right"),
    [("base", "context.md", "system.md"), ("more", "system.md", "context")],
)
def test_the_text_has_one_place(directory: Path, tier: str, file: str, right: str) -> None:
    write(directory / tier / file, "Here?")
    message = refusal(directory)
    assert message.startswith(str(directory / tier / file))
    assert right in message


def test_a_folder_without_a_manifest_is_refused(directory: Path) -> None:
    write(directory / "third" / "system.md", "Hello.")
    assert refusal(directory) == f"{directory / 'third' / 'tier.toml'} is missing."


def test_bytes_that_are_not_utf8_are_told_with_their_line(directory: Path) -> None:
    (directory / "base" / "system.md").write_bytes(b"one\ntwo \xff\n")
    assert refusal(directory) == f"{directory / 'base' / 'system.md'}, line 2: not UTF-8."


def test_a_file_of_more_than_a_mebibyte_is_refused(directory: Path) -> None:
    write(directory / "base" / "system.md", "x" * (1 << 20))
    load_tiers(directory, "Ada")
    write(directory / "base" / "system.md", "x" * ((1 << 20) + 1))
    assert "1048577 bytes" in refusal(directory)


def test_an_empty_directory_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    assert "holds no tier" in refusal(tmp_path)
    assert "can't be read" in refusal(tmp_path / "nowhere")


def test_the_explicit_directory_is_used_or_refused_but_never_replaced(
    directory: Path, tmp_path: Path
) -> None:
    here = tmp_path / "project"
    (here / "configs" / "prompt-tiers").mkdir(parents=True)
    assert find_tiers_directory(directory, tmp_path, here=here) == directory
    with pytest.raises(TierError, match="nowhere is not a directory"):
        find_tiers_directory(tmp_path / "nowhere", tmp_path, here=here)


def test_without_one_the_working_directory_comes_first_then_the_user_then_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "project"
    home = tmp_path / "config"
    here.mkdir()
    packaged = packaged_configs() / "prompt-tiers"
    assert find_tiers_directory(None, home, here=here) == packaged
    of_user = home / "keepwarm" / "prompt-tiers"
    of_user.mkdir(parents=True)
    assert find_tiers_directory(None, home, here=here) == of_user
    of_project = here / "configs" / "prompt-tiers"
    of_project.mkdir(parents=True)
    assert find_tiers_directory(None, home, here=here) == of_project
    monkeypatch.chdir(here)
    found = find_tiers_directory(None, home)
    assert found.samefile(of_project)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_told(directory: Path) -> None:
    (directory / "base" / "system.md").chmod(0)
    assert "system.md can't be read" in refusal(directory)


def test_the_packaged_tiers_load_nest_and_hold_nothing_that_changes() -> None:
    tiers = load_tiers(packaged_configs() / "prompt-tiers", "Keeper")
    assert tiers.names == ("minimal", "standard", "full")
    assert tiers.default.name == "standard"
    assert [t.need_more for t in tiers] == [("tools", "context"), ("context",), ()]
    assert [len(t.tools) for t in tiers] == [0, 14, 14]
    full = tiers.get("full")
    assert full is not None
    assert "Keeper" in full.messages[0].text
    assert [find_volatile(m.text) for m in full.messages] == [[], [], []]
    assert find_volatile(json.dumps(full.tools)) == []


def test_the_packaged_tools_describe_every_parameter() -> None:
    standard = load_tiers(packaged_configs() / "prompt-tiers", "Keeper").default
    for tool in standard.tools:
        function = tool["function"]
        assert len(function["description"]) > 30
        for parameter in function["parameters"]["properties"].values():
            assert parameter["type"]
            assert parameter["description"]
