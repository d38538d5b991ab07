#!/usr/bin/env python3
"""Write the parts of docs/ that follow from the code: settings, commands' help, and routes.

write_docs.py           write docs/configuration.md, docs/commands.md, and the table in docs/door.md
write_docs.py --check   exit 1 if they differ from what would be written
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from keepwarm.api.routes import ROUTES
from keepwarm.cli.main import app
from keepwarm.settings import fields

DOCS = Path(__file__).resolve().parent.parent / "docs"

CONFIGURATION = """\
# Configuration

Settings come from a TOML file, then the environment, then flags; each overrides the one before.

The file is the first of: `--config FILE`, `./keepwarm.toml`, `keepwarm/keepwarm.toml` under
`XDG_CONFIG_HOME` (`~/.config`). A key that isn't known, or a value out of bounds, is an error that
names the file and the key. The environment's name of a setting is `KEEPWARM_`, its section and its
key in capitals: `engine.slots` is `KEEPWARM_ENGINE_SLOTS`. Lists are split at commas there.

```toml
[engine]
model = "/var/lib/models/qwen3-8b-q4.gguf"
slots = 4
context = 32768

[server]
port = 8090
```

Several models have a table each, `[models.NAME]`, in which every key of `[engine]` may stand but
for `upstream`, `upstream_key`, `slot_dir`, `max_models`, `memory_bytes` and `swap_wait_s`; what a
table leaves out is as `[engine]` has it. `tiers` names the tiers that are warm on a model, and `pin
= true` keeps it loaded. See [operations.md](operations.md#several-models).

This page is written by `scripts/write_docs.py` from the code.
"""

ROUTES_BEGIN, ROUTES_END = "<!-- routes -->", "<!-- end of routes -->"

COMMANDS = """\
# Commands

What `--help` says of each command, written by `scripts/write_docs.py`.
"""


def configuration() -> str:
    """docs/configuration.md."""
    out = [CONFIGURATION]
    section = ""
    for key, kind, default in fields():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            out.append(f"\n## [{section}]\n\n| key | type | default | what |\n|---|---|---|---|")
        plain, meta = _split(kind)
        shown = msgspec.json.encode(default).decode()
        text = meta.description if meta and meta.description else ""
        name = key.partition(".")[2]
        out.append(f"| `{name}` | {_type(plain, meta)} | `{shown}` | {text.replace('|', ' or ')} |")
    return "\n".join(out) + "\n"


def _split(kind: Any) -> tuple[Any, msgspec.Meta | None]:
    if get_origin(kind) is Annotated:
        plain, *metas = get_args(kind)
        return plain, next((m for m in metas if isinstance(m, msgspec.Meta)), None)
    return kind, None


def _type(plain: Any, meta: msgspec.Meta | None) -> str:
    if get_origin(plain) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(plain))
    if get_origin(plain) is tuple:
        return "list of text"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    text = words[plain]
    if meta is None:
        return text
    low = meta.ge if meta.ge is not None else meta.gt
    if low is not None and meta.le is not None:
        text += f", {low:,} to {meta.le:,}"
    elif low is not None:
        text += f", {low:,} or more"
    return text


def commands() -> str:
    """docs/commands.md."""
    root = typer.main.get_command(app)
    out = [COMMANDS]
    for path in _walk(root, ("keepwarm",)):
        text = CliRunner().invoke(app, [*path[1:], "--help"], prog_name="keepwarm").stdout
        out.append(f"\n## {' '.join(path)}\n\n```\n{_trimmed(text)}\n```")
    return "\n".join(out) + "\n"


def _walk(command: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = [path]
    if isinstance(command, TyperGroup):
        context = command.make_context(path[-1], [], resilient_parsing=True)
        for name in command.list_commands(context):
            found += _walk(command.get_command(context, name), (*path, name))
    return found


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def door() -> str:
    """docs/door.md, with the table of routes put in."""
    head, _, rest = (DOCS / "door.md").read_text(encoding="utf-8").partition(ROUTES_BEGIN)
    lines = ["| method | path | way | access |", "|---|---|---|---|"]
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for route in ROUTES:
        way = f"{route.way.value}, {route.status}" if route.reason else route.way.value
        grouped.setdefault((route.method, way, route.access.value), []).append(f"`{route.path}`")
    for (method, way, access), paths in grouped.items():
        lines.append(f"| {method} | {', '.join(paths)} | {way} | {access} |")
    return "\n".join([head + ROUTES_BEGIN, *lines, ROUTES_END + rest.partition(ROUTES_END)[2]])


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    # The width and colours of whoever's terminal this is must not show in the pages.
    os.environ |= {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    stale = []
    pages = {"configuration.md": configuration(), "commands.md": commands(), "door.md": door()}
    for name, text in pages.items():
        path = DOCS / name
        if check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"docs/{', docs/'.join(stale)} is out of step: run scripts/write_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
