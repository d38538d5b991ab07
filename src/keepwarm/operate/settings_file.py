"""Settings as the text of a `keepwarm.toml`."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from keepwarm.settings import OF_THE_HOUSE, Settings


def settings_toml(settings: Settings) -> str:
    """Settings as a `keepwarm.toml`, every key written out."""
    lines: list[str] = []
    for section in msgspec.structs.fields(settings):
        if section.name != "models":
            lines += _table(section.name, msgspec.structs.asdict(getattr(settings, section.name)))
    for name, model in settings.models.items():
        values = {
            key: value
            for key, value in msgspec.structs.asdict(model.engine).items()
            if key not in OF_THE_HOUSE
        }
        lines += _table(f'models."{name}"', {**values, "tiers": model.tiers, "pin": model.pin})
    return "\n".join(lines) + "\n"


def _table(name: str, values: Mapping[str, object]) -> list[str]:
    return [f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]


def toml_value(value: object) -> str:
    """A scalar or list in TOML; JSON's strings are TOML's basic strings."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
