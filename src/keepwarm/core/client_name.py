"""Which coding agent asks, by what it calls itself."""

from __future__ import annotations

import re

# A product and its version as `User-Agent` begins with them (seen with Claude Code 2.1.332, Codex
# 0.171, opencode 1.18, Qwen Code 0.24 and pi 1.6; Aider doesn't name itself).
_AGENT = re.compile(
    r"(?i)(?:claude-cli|codex[\w-]{0,20}|opencode|qwencode|pi|hermes[\w-]{0,20})/\d[\w.+-]{0,30}"
)


def agent_of(user_agent: str) -> str:
    """`claude-cli/2.1.332` of a `User-Agent` that begins so; empty for whoever else asks."""
    match = _AGENT.match(user_agent)
    return match[0].lower() if match else ""
