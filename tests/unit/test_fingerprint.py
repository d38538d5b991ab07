"""What changes KV state changes the fingerprint, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.fingerprint import fingerprint
from keepwarm.engine.gguf_header import ModelHeader, _rope_switch
from keepwarm.engine.launch import Launch
from keepwarm.engine.options import EngineOptions
from keepwarm.engine.process import EngineIdentity

PHI = ModelHeader(
    path=Path("phi.gguf"),
    name="phi",
    architecture="phi3",
    memory=MemoryKind.PLAIN,
    window_tokens=0,
    train_context_tokens=131072,
    chat_template="",
    size_bytes=1,
    file_id="f",
    rope_switch_tokens=4096,
)


def launch_with(*extra: str, model: ModelHeader | None = PHI) -> Launch:
    options = EngineOptions(
        model=Path("phi.gguf"),
        slots=1,
        context_tokens=4096,
        slot_dir=Path("slots"),
        unified=False,
        extra=extra,
    )
    return Launch(
        EngineIdentity(kind="llama-server", build="b1"),
        model,
        options if model else None,
        Path("llama-server"),
        None if model else "http://127.0.0.1:8080",
        Path("slots"),
        1,
    )


def of(launch: Launch, *, slot_tokens: int = 4096, **props: Any) -> str:
    told = {"chat_template": "t", "default_generation_settings": {"n_ctx": slot_tokens}, **props}
    return fingerprint(launch, told, form="rows")


def test_a_slots_context_decides_which_rope_factors_are_used() -> None:
    short = of(launch_with())
    assert of(launch_with(), slot_tokens=2048) == short
    assert of(launch_with(), slot_tokens=4097) != short
    assert of(launch_with(), slot_tokens=8192) == of(launch_with(), slot_tokens=131072)
    plain = launch_with(model=replace(PHI, rope_switch_tokens=0))
    assert of(plain) == of(plain, slot_tokens=131072)
    unseen = launch_with(model=None)
    assert of(unseen) != of(unseen, slot_tokens=8192), "it may be such a model"


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 0),
        ({"phi3.rope.scaling.original_context_length": 4096}, 4096),
        (
            {
                "phi3.rope.scaling.original_context_length": 4096,
                "phi3.rope.scaling.type": "longrope",
            },
            4096,
        ),
        (
            {"phi3.rope.scaling.original_context_length": 4096, "phi3.rope.scaling.type": "yarn"},
            0,
        ),
    ],
)
def test_only_a_model_with_two_sets_of_factors_switches(
    fields: dict[str, Any], tokens: int
) -> None:
    assert _rope_switch(fields, "phi3") == tokens


@pytest.mark.parametrize(
    "extra",
    [
        ("--threads", "3"),
        ("-t", "8", "-tb", "8"),
        ("--mlock",),
        ("--no-mmap", "-ngl", "99"),
        ("--alias", "mine"),
        ("--api-key", "secret"),
        ("--metrics", "--slots", "--no-webui"),
        ("-ot", "exps=CPU", "--n-cpu-moe", "4"),
        ("--temp", "0.7", "--top-k", "20"),
        ("--log-file", "x.log", "-v"),
    ],
)
def test_what_changes_no_state_leaves_all_of_it_warm(extra: tuple[str, ...]) -> None:
    assert of(launch_with(*extra)) == of(launch_with())


@pytest.mark.parametrize(
    "extra",
    [
        ("--lora", "a.gguf"),
        ("--lora-scaled", "a.gguf", "0.5"),
        ("--control-vector", "v.gguf"),
        ("--rope-freq-base", "1000000"),
        ("--rope-scaling", "yarn"),
        ("--yarn-orig-ctx", "8192"),
        ("--override-kv", "phi3.x=int:3"),
        ("-ctk", "q8_0"),
        ("-fa", "on"),
        ("--context-shift",),
        ("--a-flag-of-next-year",),
        ("--threads", "3", "--lora", "a.gguf"),
    ],
)
def test_what_may_change_it_counts(extra: tuple[str, ...]) -> None:
    assert of(launch_with(*extra)) != of(launch_with())


def test_a_value_is_not_taken_for_a_flag() -> None:
    assert of(launch_with("--alias", "--lora")) == of(launch_with())


def test_an_alias_is_no_model() -> None:
    unseen = launch_with(model=None)
    told = {"model_path": "/m.gguf", "model_ftype": "q4"}
    assert of(unseen, model_alias="a", **told) == of(unseen, model_alias="b", **told)
    assert of(unseen, **told) != of(unseen, **(told | {"model_path": "/other.gguf"}))
