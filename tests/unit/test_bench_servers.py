"""How the benchmark starts its servers: with which settings, flags and places."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.bench.client import ChatClient
from keepwarm.bench.prompts import Questions, direct_request, keepwarm_request, user
from keepwarm.bench.servers import (
    KeepwarmServer,
    Workplace,
    _serve_command,
    default_flags,
    default_params,
    settings_toml,
)
from keepwarm.core.tiers import TierSource, build_tiers
from keepwarm.engine.options import EngineOptions
from keepwarm.settings import (
    EngineSettings,
    ServerSettings,
    Settings,
    TierSettings,
    fields,
    load_settings,
)

OPTIONS = EngineOptions(
    model=Path("m.gguf"),
    slots=4,
    context_tokens=8192,
    slot_dir=Path("slots"),
    unified=True,
    threads=3,
)
# What Keepwarm decides for its engine; an engine as it comes has to decide it by itself.
DECIDED = ("slot_prompt_similarity", "cache_idle_slots", "slot_save_path", "kv_unified", "n_batch")


def test_every_setting_comes_back_from_the_file_it_was_written_to(tmp_path: Path) -> None:
    settings = Settings(
        engine=EngineSettings(model='a "quoted" \\ path ü', extra=("-ngl", "99"), slots=7),
        server=ServerSettings(queue_timeout_s=1.5),
        tiers=TierSettings(escalate=False),
    )
    file = tmp_path / "keepwarm.toml"
    file.write_text(settings_toml(settings), encoding="utf-8")
    assert load_settings(file=file)[0] == settings


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x7f")))
def test_any_path_survives_the_settings_file(text: str) -> None:
    written = settings_toml(Settings(engine=EngineSettings(model=text)))
    assert msgspec.toml.decode(written)["engine"]["model"] == text


def test_an_engine_as_it_comes_decides_about_slots_itself() -> None:
    params = default_params(OPTIONS, port=1)
    assert not params.keys() & set(DECIDED)
    assert params["n_parallel"] == -1
    assert "cache_ram_mib" not in params
    flags = default_flags(OPTIONS, port=1)
    assert not {"--parallel", "--cache-ram", "--slot-prompt-similarity", "--kv-unified"} & set(
        flags
    )


def test_every_arm_gets_the_same_model_context_and_threads() -> None:
    params = default_params(OPTIONS, port=1)
    ours = OPTIONS.embedded_params(host="127.0.0.1", port=1)
    for key in ("model.path", "n_ctx", "cpuparams.n_threads", "cache_type_k", "flash_attn_type"):
        assert params[key] == ours[key]
    flags = default_flags(OPTIONS, port=1)
    assert flags[flags.index("--ctx-size") + 1] == "8192"
    assert flags[flags.index("--threads") + 1] == "3"


def test_an_engine_that_is_to_find_nothing_has_one_slot_and_no_prompt_cache() -> None:
    params = default_params(OPTIONS, port=1, plain=True)
    assert (params["n_parallel"], params["cache_ram_mib"]) == (1, 0)
    flags = default_flags(OPTIONS, port=1, plain=True)
    assert flags[flags.index("--parallel") + 1] == "1"
    assert flags[flags.index("--cache-ram") + 1] == "0"


async def test_keepwarm_is_started_without_keys_and_without_the_users_environment(
    tmp_path: Path,
) -> None:
    client = ChatClient()
    settings = Settings(server=ServerSettings(api_keys=("secret",), host="0.0.0.0"))
    server = KeepwarmServer(settings, directory=tmp_path, client=client)
    process = server._make()
    await client.close()
    (file,) = tmp_path.glob("keepwarm-*.toml")
    written = load_settings(file=file)[0]
    assert written.server.api_keys == ()
    assert written.server.host == "127.0.0.1"
    assert str(written.server.port) in server.base_url
    unset = set(process._command)
    assert {"KEEPWARM_" + k.replace(".", "_").upper() for k, _, _ in fields()} <= unset


def test_a_workplace_leaves_nothing_behind() -> None:
    with Workplace(1 << 20) as place:
        store = place.store("store")
        staging = place.staging(store)
        staging.mkdir(parents=True, exist_ok=True)
        (staging / "file").touch()
        (store / "file").touch()
        root = place.root
        assert place.store("store") == store
    assert not root.exists()
    assert not staging.exists()


def test_a_workplace_is_removed_after_an_error_too() -> None:
    place = Workplace(1 << 20)
    assert place.root.is_dir()
    with pytest.raises(RuntimeError), place:
        raise RuntimeError
    assert not place.root.exists()


def test_no_question_is_asked_twice_and_each_begins_otherwise() -> None:
    questions = Questions()
    asked = [questions.new() for _ in range(500)]
    assert len(set(asked)) == 500
    assert all(a.split()[0] != b.split()[0] for a, b in pairwise(asked))


def test_both_shapes_of_a_request_ask_the_same() -> None:
    tiers = build_tiers(
        [
            TierSource(
                name="small",
                folder="small",
                description="d",
                text="You are an agent.",
                text_file="system.md",
            )
        ],
        agent_name="Keeper",
    )
    direct = direct_request(tiers.default, [user("hello")], reply_tokens=4)
    through = keepwarm_request(tiers.default, [user("hello")], reply_tokens=4)
    assert through["model"] == "small"
    assert direct["messages"][-1:] == through["messages"]
    assert direct["messages"][0]["content"] == "You are an agent."
    assert direct["max_tokens"] == through["max_tokens"]


def test_a_run_neither_uses_nor_changes_the_user_s_state(
    tmp_path: Path,
) -> None:
    command = _serve_command(tmp_path / "keepwarm.toml")
    at = command.index("/usr/bin/env")
    # What `env` would run is replaced by itself: it then prints what the server would get.
    ended = command[at : command.index("-m", at) - 1]
    theirs = {
        "XDG_STATE_HOME": "/theirs",
        "STATE_DIRECTORY": "/theirs",
        "KEEPWARM_SERVER_PORT": "1",
    }
    said = subprocess.run(ended, env=theirs, capture_output=True, text=True, check=True).stdout
    assert said.split() == [f"XDG_STATE_HOME={tmp_path / 'state'}"]
