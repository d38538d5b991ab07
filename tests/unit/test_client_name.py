"""Which agent asks, by its User-Agent."""

from __future__ import annotations

import pytest

from keepwarm.core.client_name import agent_of


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("claude-cli/2.1.332 (external, sdk-cli)", "claude-cli/2.1.332"),
        ("codex_exec/0.171.0 (Debian 12.0.0; x86_64) xterm", "codex_exec/0.171.0"),
        ("opencode/1.18.33 ai-sdk/provider-utils/4.0.23", "opencode/1.18.33"),
        ("QwenCode/0.24.4 (linux; x64)", "qwencode/0.24.4"),
        ("pi/1.6.0 (linux; node/v24.22.3; x64)", "pi/1.6.0"),
        ("OpenAI/Python 2.20.0", ""),
        ("pip/25.0", ""),
        ("curl/8.1 claude-cli/2.1", ""),
        ("claude-cli", ""),
        ("", ""),
    ],
)
def test_an_agent_is_known_by_its_name_and_version(said: str, name: str) -> None:
    assert agent_of(said) == name
