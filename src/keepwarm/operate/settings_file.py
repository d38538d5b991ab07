"""Settings as the text of a `keepwarm.toml`."""

from __future__ import annotations

import json

import msgspec

from keepwarm.settings import Settings


def settings_toml(settings: Settings) -> str:
    """Settings as a `keepwarm.toml`, every key written out."""
    lines: list[str] = []
    for section in msgspec.structs.fields(settings):
        lines.append(f"[{section.name}]")
        values = getattr(settings, section.name)
        lines += [
            f"{field.name} = {toml_value(getattr(values, field.name))}"
            for field in msgspec.structs.fields(values)
        ]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """A scalar or list in TOML; JSON's strings are TOML's basic strings."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
