"""Batch lines for tests."""

from __future__ import annotations

import json
from typing import Any

WORDS = (
    "The bridge over the river was closed for three weeks while the masons set new stones. "
    "People walked around by the mill, and the baker moved his stall to the other bank. "
)


def document(number: int, *, sentences: int = 12) -> str:
    """A text of about 40 tokens a sentence pair, unlike any other number's from its first word."""
    return f"Report {number}. " + " ".join(f"({number}.{i}) {WORDS}" for i in range(sentences // 2))


def line(
    custom_id: str,
    text: str = "Hello there.",
    *,
    model: str = "any",
    max_tokens: int = 8,
    system: str | None = None,
    messages: list[dict[str, Any]] | None = None,
    **wishes: Any,
) -> bytes:
    """One chat task; `wishes` go into its `keepwarm` object."""
    listed = messages or [{"role": "user", "content": text}]
    if system:
        listed = [{"role": "system", "content": system}, *listed]
    value: dict[str, Any] = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "messages": listed,
        },
    }
    if wishes:
        value["keepwarm"] = wishes
    return json.dumps(value).encode() + b"\n"
