"""System messages where the running template takes them.

Newer agents send system and developer messages between turns, and several at the start. Some
templates refuse those, some put every one in front, which makes all that was said before cold. A
render at start tells what this one does (`engine.rendering`); what it doesn't take goes on in
place as the user's words, between marks that models know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.core.roles import SYSTEM_ROLES

RULE = "system-reminder"


@dataclass(frozen=True, slots=True)
class SystemPlaces:
    """What a template takes: several system messages at the start, one between turns, in place.

    `developer`: that role, rather than `system` alone.
    """

    several: bool = True
    late: bool = True
    developer: bool = True


def steered(
    body: dict[str, Any], takes: SystemPlaces, *, place: str = "messages"
) -> tuple[dict[str, Any], int]:
    """A body whose system messages stand where the template takes them, and how many were moved.

    Args:
        body: of chat completions, or of responses.
        takes: what the running template does.
        place: where the body has its messages.
    """
    items = body.get(place)
    if takes == SystemPlaces() or not isinstance(items, list):
        return body, 0
    said = body.get("instructions") if place == "input" else None
    first = said if isinstance(said, str) and said else None
    out: list[Any] = []
    opening: list[str] = []
    moved = 0
    for item in items:
        if not _is_system(item):
            out.append(item)
            continue
        leads = len(out) == len(opening) and all(map(_is_system, out))
        if leads and (takes.several or (first is None and not opening)):
            opening.append("")
            out.append(_as_role(item, takes))
        elif leads:
            # A second one at the start: one text with the first.
            moved += 1
            if first is not None:
                first = f"{first}\n\n{_text(item)}"
            else:
                out[0] = {**out[0], "content": f"{_text(out[0])}\n\n{_text(item)}"}
        elif takes.late:
            out.append(_as_role(item, takes))
        else:
            moved += 1
            text = f"<system-reminder>\n{_text(item)}\n</system-reminder>"
            out.append({"role": "user", "content": text})
    body = {**body, place: out}
    if first is not None and first != said:
        body["instructions"] = first
    return body, moved


def _is_system(item: object) -> bool:
    return isinstance(item, Mapping) and item.get("role") in SYSTEM_ROLES


def _as_role(item: Mapping[str, Any], takes: SystemPlaces) -> Mapping[str, Any]:
    if takes.developer or item.get("role") == "system":
        return item
    return {**item, "role": "system"}


def _text(item: Mapping[str, Any]) -> str:
    content = item.get("content")
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
