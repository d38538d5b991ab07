"""Several models: their tables in the settings, and what a request's `model` stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepwarm.cli.options import model_flags
from keepwarm.deployment.model import Models
from keepwarm.errors import ConfigError, NotFoundError
from keepwarm.operate.settings_file import settings_toml
from keepwarm.settings import Settings, load_settings

TWO = """
[engine]
slots = 3
context = 8192
[models.coder]
model = "coder.gguf"
context = 65536
pin = true
[models."chat.v2"]
model = "chat.gguf"
tiers = ["minimal"]
idle_unload_s = 60
"""


def settings_of(tmp_path: Path, text: str, **flags: object) -> Settings:
    file = tmp_path / "keepwarm.toml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file=file, flags={k.replace("__", "."): v for k, v in flags.items()})[0]


def test_a_models_table_has_the_engines_keys_and_its_section_for_defaults(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TWO)
    coder, chat = settings.models.values()
    assert (coder.engine.model, coder.engine.context, coder.engine.slots) == (
        "coder.gguf",
        65536,
        3,
    )
    assert (chat.engine.context, chat.engine.idle_unload_s) == (8192, 60)
    assert coder.pin
    own = settings.of_model("chat.v2")
    assert own.engine.model == "chat.gguf"
    assert own.tiers.warm == ("minimal",)
    assert settings.of_model("coder").tiers.warm == ()


def test_the_tables_come_back_from_the_file_they_are_written_to(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, TWO)
    assert settings_of(tmp_path, settings_toml(settings)) == settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[models.a]\nmodel = "a.gguf"\nslotz = 3', "slotz"),
        ('[models.a]\nmodel = "a.gguf"\nslots = 0', "slots"),
        ("[models.a]\nslots = 3", "names no file"),
        ('[models."a:b"]\nmodel = "a.gguf"', "a name that a model can't have"),
        ('[models.standard]\nmodel = "a.gguf"', "a name that a model can't have"),
        ('[models.a]\nmodel = "a.gguf"\nmax_models = 2', "belongs to [engine]"),
        ('[engine]\nupstream = "http://x"\n[models.a]\nmodel = "a.gguf"', "llama-swap"),
        ('[models]\na = "a.gguf"', "a table [models.NAME]"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as told:
        settings_of(tmp_path, text)
    assert says in str(told.value)
    assert "models" in str(told.value)


def test_models_named_on_the_command_line_are_the_only_ones(tmp_path: Path) -> None:
    assert not settings_of(tmp_path, TWO, engine__model="other.gguf").models
    flags = model_flags(["~/models/Qwen2.5-Coder Q4.gguf", "b.gguf"])
    file = tmp_path / "keepwarm.toml"
    file.write_text(TWO, encoding="utf-8")
    settings, _ = load_settings(file=file, flags=flags)
    assert list(settings.models) == ["Qwen2.5-Coder-Q4", "b"]
    assert settings.models["b"].engine.slots == 3
    with pytest.raises(ConfigError, match="same file name"):
        model_flags(["a/b.gguf", "c/b.gguf"])


def test_a_requests_model_names_a_model_a_tier_on_it_or_the_default(tmp_path: Path) -> None:
    models = Models(settings_of(tmp_path, TWO))
    coder, chat = models
    assert models.default is coder
    assert coder.is_pinned
    assert models.addressed("chat.v2") == (chat, None)
    assert models.addressed("chat.v2:standard") == (chat, "standard")
    for other in ("standard", "gpt-4o", "", None, 7, "nobody:standard"):
        assert models.addressed(other) == (coder, None)
    with pytest.raises(ConfigError, match=r"chat\.v2"):
        models.check_tiers(("minimal", "chat.v2"))


def test_where_names_are_strict_only_those_of_models_and_tiers_are_taken(tmp_path: Path) -> None:
    models = Models(settings_of(tmp_path, TWO))
    for name in ("coder", "chat.v2:minimal", "coder:auto", "minimal", "auto", None):
        models.check(name, ("minimal", "full"), ())
    for name in ("gpt-4o", "coder:other", "nobody:minimal"):
        with pytest.raises(NotFoundError):
            models.check(name, ("minimal", "full"), ())
    with pytest.raises(NotFoundError):
        models.named("gpt-4o")


def test_one_model_has_no_name_and_takes_any(tmp_path: Path) -> None:
    models = Models(settings_of(tmp_path, '[engine]\nmodel = "a.gguf"'))
    assert not models.several
    assert models.addressed("a:standard") == (models.default, None)
    with pytest.raises(NotFoundError):
        models.named("")
