"""Which arguments an engine binary is given, and which are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepwarm.engine import launch as launch_module
from keepwarm.engine.arguments import COSTS, conflicts, flag_of, leave_out, unknown_argument
from keepwarm.engine.launch import plan_own
from keepwarm.engine.options import EngineOptions
from keepwarm.errors import ConfigError
from keepwarm.settings import EngineSettings
from tinymodels import small_model

OPTIONS = EngineOptions(
    model=Path("m.gguf"), slots=2, context_tokens=2048, slot_dir=Path("slots"), unified=True
)
FLAGS = OPTIONS.binary_flags(host="127.0.0.1", port=9000)


@pytest.mark.parametrize(
    "argument",
    ["--port", "--host", "--api-key", "-np", "--slot-save-path", "--api_key", "--port=9", "-c"],
)
def test_what_takes_the_engine_from_under_keepwarm_is_refused_by_name(argument: str) -> None:
    (said,) = conflicts(["-ngl", "99", argument, "1"], ())
    assert said.startswith(argument.partition("=")[0].replace("_", "-"))
    assert len(said) > len(argument) + 10  # and what to do instead


def test_harmless_arguments_are_nobodys_business() -> None:
    extra = ["-ngl", "99", "--lora", "a.gguf", "-t", "4", "--no-mmap", "-ot", "exps=CPU", "-fa"]
    assert conflicts(extra, ()) == []


async def test_a_key_in_the_environment_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(binary: Path) -> None:
        raise AssertionError(f"{binary} was asked")

    monkeypatch.setattr(launch_module, "binary_identity", never)
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    settings = EngineSettings(model=str(small_model()), binary="/bin/true", extra=("--port", "1"))
    with pytest.raises(ConfigError, match=r"--port .*LLAMA_API_KEY") as refused:
        await plan_own(settings, slot_dir=Path("slots"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("log", "argument"),
    [
        ("error: invalid argument: --no-cache-idle-slots", "--no-cache-idle-slots"),
        ("error: unknown argument: --kv-unified\nusage: llama-server", "--kv-unified"),
        ("llama-server: error: unrecognized arguments: --jinja", "--jinja"),
        ("error: invalid argument: auto", "auto"),
        ("error loading model: out of memory", None),
    ],
)
def test_an_unknown_argument_is_found_in_the_engines_last_words(
    log: str, argument: str | None
) -> None:
    assert unknown_argument(log) == argument


def test_each_flag_that_may_go_is_left_out_with_its_value_and_nothing_else() -> None:
    for flag in set(COSTS) & set(FLAGS):
        assert flag_of(flag, FLAGS) == flag
        left = leave_out(FLAGS, {flag})
        at = FLAGS.index(flag)
        values = 0 if FLAGS[at + 1].startswith("--") else 1
        assert left == FLAGS[:at] + FLAGS[at + 1 + values :]


def test_an_unknown_value_takes_its_flag_along() -> None:
    assert flag_of("auto", FLAGS) == "--flash-attn"
    left = leave_out(FLAGS, {"--flash-attn"})
    assert "auto" not in left
    assert left[-2:] == FLAGS[-2:]


@pytest.mark.parametrize("argument", ["--model", "--parallel", "--ctx-size", "--port", "-ngl"])
def test_what_nothing_works_without_is_not_left_out(argument: str) -> None:
    assert flag_of(argument, FLAGS) is None
