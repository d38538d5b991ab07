"""Find and read a directory of tiers: one folder a tier.

    minimal/tier.toml    description, extends, context_role, need_more, default
    minimal/system.md    the text of a tier that extends nothing
    standard/context.md  the text of a tier that extends another
    standard/tools.json  OpenAI tool definitions, a JSON array

Every error names the file and, where there is one, the key or line. The texts are read once, so
what they say is the same in every request; changing a file takes effect at the next load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from keepwarm.core.tiers import ContextRole, TierSet, TierSource, build_tiers
from keepwarm.errors import TierError
from keepwarm.settings import Places, TierSettings

__all__ = ["deployed_tiers", "find_tiers_directory", "load_tiers", "packaged_configs"]

_MANIFEST = "tier.toml"
_ROOT_TEXT = "system.md"
_CONTEXT_TEXT = "context.md"
_TOOLS = "tools.json"
_KNOWN_FILES = (_MANIFEST, _ROOT_TEXT, _CONTEXT_TEXT, _TOOLS, "README.md")
_MAX_FILE_BYTES = 1 << 20  # a text of 1 MiB has some 250,000 tokens; anything larger is a mistake


class _Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    description: Annotated[str, msgspec.Meta(min_length=1)]
    extends: str | None = None
    context_role: ContextRole = ContextRole.SYSTEM
    need_more: tuple[Annotated[str, msgspec.Meta(pattern="^[a-z]{1,32}$")], ...] = ()
    default: bool = False


class _Parameters(msgspec.Struct, frozen=True):
    type: Literal["object"]
    properties: dict[str, dict[str, Any]]
    required: tuple[str, ...] = ()


class _Function(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    # The pattern is OpenAI's for function names.
    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, msgspec.Meta(min_length=1)]
    parameters: _Parameters
    strict: bool | None = None


class _Tool(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["function"]
    function: _Function


def load_tiers(directory: Path, agent_name: str) -> TierSet:
    """Read all tiers below `directory` and write `agent_name` into their texts.

    Raises:
        TierError: something can't be read, decoded or joined; the message names file and key or
            line. Nothing is kept of a directory that has one bad tier.
    """
    try:
        folders = sorted(p for p in directory.iterdir() if p.is_dir() and p.name[0] not in "._")
    except OSError as error:
        raise TierError(f"{directory}: the tiers can't be read: {error.strerror}.") from error
    if not folders:
        raise TierError(f"{directory} holds no tier: make a folder with a {_MANIFEST} in it.")
    return build_tiers([_read_tier(folder) for folder in folders], agent_name=agent_name)


def deployed_tiers(settings: TierSettings, places: Places) -> tuple[Path, TierSet]:
    """The directory and the tiers that settings name, or those found without one.

    Raises:
        TierError: as the two below.
    """
    explicit = Path(settings.dir).expanduser() if settings.dir else None
    directory = find_tiers_directory(explicit, places.config_home)
    return directory, load_tiers(directory, settings.agent_name)


def find_tiers_directory(
    explicit: Path | None, config_home: Path, *, here: Path | None = None
) -> Path:
    """The directory to load tiers from: the first of these that exists.

    `explicit` as given; `configs/prompt-tiers` under `here` (the working directory if None);
    `keepwarm/prompt-tiers` under `config_home` (XDG_CONFIG_HOME); the packaged tiers.

    Raises:
        TierError: `explicit` isn't a directory (no other is tried then), or none exists.
    """
    if explicit is not None:
        if not explicit.is_dir():
            raise TierError(f"{explicit} is not a directory of tiers.")
        return explicit
    candidates = [
        (here or Path()) / "configs" / "prompt-tiers",
        config_home / "keepwarm" / "prompt-tiers",
        packaged_configs() / "prompt-tiers",
    ]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise TierError(f"No directory of tiers was found. Looked at: {tried}.")


def packaged_configs() -> Path:
    """The `configs` directory that came with Keepwarm: in the package, or in a checkout's root."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def tools_template() -> Path:
    """Our own chat template for ChatML models whose template drops tools."""
    return packaged_configs() / "chat-templates" / "chatml-tools.jinja"


def _read_tier(folder: Path) -> TierSource:
    _refuse_unknown_files(folder)
    path = folder / _MANIFEST
    try:
        manifest = msgspec.toml.decode(_read_text(path), type=_Manifest)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise TierError(f"{path}: {error}") from error
    own, other = _ROOT_TEXT, _CONTEXT_TEXT
    if manifest.extends is not None:
        own, other = other, own
    if (folder / other).exists():
        rule = "nothing" if manifest.extends is None else "another"
        raise TierError(f"{folder / other}: a tier that extends {rule} has its text in {own}.")
    text = folder / own
    tools = folder / _TOOLS
    return TierSource(
        name=folder.name,
        folder=str(folder),
        description=manifest.description,
        text=_read_text(text) if text.exists() else None,
        text_file=own,
        extends=manifest.extends,
        tools=_read_tools(tools) if tools.exists() else (),
        context_role=manifest.context_role,
        need_more=manifest.need_more,
        is_default=manifest.default,
    )


def _refuse_unknown_files(folder: Path) -> None:
    """A misspelt `contxt.md` would otherwise be left out without a word."""
    for path in sorted(folder.iterdir()):
        if path.name not in _KNOWN_FILES and path.name[0] != "." and path.name[-1] != "~":
            known = ", ".join(_KNOWN_FILES)
            raise TierError(f"{path}: not a file of a tier. Known are: {known}.")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TierError(f"{path} is missing.") from error
    except OSError as error:
        raise TierError(f"{path} can't be read: {error.strerror}.") from error
    if len(data) > _MAX_FILE_BYTES:
        raise TierError(f"{path} has {len(data)} bytes; at most {_MAX_FILE_BYTES} are read.")
    try:
        # One kind of line end, so that a checkout on another system has the same tokens.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TierError(f"{path}, line {line}: not UTF-8.") from error


def _read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    text = _read_text(path)
    try:
        tools = json.loads(text)
    except json.JSONDecodeError as error:
        raise TierError(f"{path}, line {error.lineno}: {error.msg}.") from error
    if not isinstance(tools, list) or not tools:
        raise TierError(f"{path}, line 1: it must be a JSON array of at least one tool.")
    starts = _element_lines(text)
    for tool, line in zip(tools, starts, strict=True):
        _check_tool(tool, f"{path}, line {line}")
    return tuple(tools)


def _check_tool(tool: object, where: str) -> None:
    try:
        parsed = msgspec.convert(tool, type=_Tool)
    except msgspec.ValidationError as error:
        raise TierError(f"{where}: {error}") from error
    parameters = parsed.function.parameters
    missing = [key for key in parameters.required if key not in parameters.properties]
    if missing:
        raise TierError(
            f"{where}: {parsed.function.name} requires {missing[0]!r}, which isn't among its "
            "properties."
        )


def _element_lines(text: str) -> list[int]:
    """The line on which each element of a valid, non-empty JSON array begins."""
    decoder = json.JSONDecoder()
    lines = []
    position = text.index("[") + 1
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        lines.append(text.count("\n", 0, position) + 1)
        _, position = decoder.raw_decode(text, position)
        position += len(text[position:]) - len(text[position:].lstrip())
        if text[position] != ",":
            return lines
        position += 1
