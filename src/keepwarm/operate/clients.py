"""The clients that `keepwarm run` starts: how each is found, and how it is told where to ask.

One table, `CLIENTS`. A client is told by its environment, by arguments before the user's own, or by
a file in a private directory. Nothing of the user's own configuration is written, and where the
client allows it, that configuration goes on to count. Pure.

Each entry was tried with the version it names, or says that it wasn't.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Any name that isn't a tier's is passed on, and the client's own system prompt is left alone.
MODEL = "local"
# A request to a slow machine may take its time; clients give up after ten minutes by default.
_PATIENCE_S = 3600


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a client is told: the gateway's address without a path, a key, the room for a prompt.

    `context_tokens` is None where the gateway doesn't run yet and nobody knows. `moves_blocks`:
    whether it has the rule that moves the blocks of agents' prompts that change (`move-known`).
    """

    url: str
    key: str = "none"
    context_tokens: int | None = None
    moves_blocks: bool = True

    @property
    def openai_url(self) -> str:
        """The address as clients of OpenAI's API want it."""
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """What is set for one run of a client.

    `environment` None: taken out of what the client inherits. `files` are texts by their names in
    the private directory. `arguments` stand before the user's own.
    """

    environment: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client. `places` are looked at when the command isn't on the PATH; ~ is the home."""

    name: str
    title: str
    command: str
    install: str
    tried: str
    configure: Callable[[Endpoint, Path], Configured]
    places: tuple[str, ...] = ()


def _claude(endpoint: Endpoint, _: Path) -> Configured:
    models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    families = tuple(f"ANTHROPIC_DEFAULT_{name}_MODEL" for name in ("OPUS", "SONNET", "HAIKU"))
    return Configured(
        environment={
            "ANTHROPIC_BASE_URL": endpoint.url,
            "ANTHROPIC_AUTH_TOKEN": endpoint.key,
            # It would be sent instead, and asked about.
            "ANTHROPIC_API_KEY": None,
            **dict.fromkeys((*models, *families), MODEL),
            # Without it the system prompt begins with a line that is new in each session.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "API_TIMEOUT_MS": str(_PATIENCE_S * 1000),
            **_claude_room(endpoint),
        },
        # Its own way to move them; versions before 2.1.98 or so don't know it.
        arguments=() if endpoint.moves_blocks else ("--exclude-dynamic-system-prompt-sections",),
    )


def _claude_room(endpoint: Endpoint) -> dict[str, str]:
    """A model that it doesn't know is taken to have a million tokens, and never compacted for."""
    if not endpoint.context_tokens:
        return {}
    limit = _limit(endpoint)
    return {
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(limit["context"]),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(limit["context"]),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(limit["output"]),
    }


def _codex(endpoint: Endpoint, _: Path) -> Configured:
    provider = {
        "name": "Keepwarm",
        "base_url": endpoint.openai_url,
        "wire_api": "responses",
        "env_key": "KEEPWARM_CLIENT_KEY",
        "stream_idle_timeout_ms": _PATIENCE_S * 1000,
    }
    values: dict[str, object] = {"model_provider": "keepwarm", "model": MODEL}
    if endpoint.context_tokens:
        values["model_context_window"] = endpoint.context_tokens
    values |= {f"model_providers.keepwarm.{name}": value for name, value in provider.items()}
    # A JSON string or number is TOML's, too.
    arguments = tuple(a for k, v in values.items() for a in ("-c", f"{k}={json.dumps(v)}"))
    return Configured(environment={"KEEPWARM_CLIENT_KEY": endpoint.key}, arguments=arguments)


def _opencode(endpoint: Endpoint, _: Path) -> Configured:
    limit = {"limit": _limit(endpoint)} if endpoint.context_tokens else {}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"keepwarm/{MODEL}",
        "small_model": f"keepwarm/{MODEL}",
        "provider": {
            "keepwarm": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Keepwarm",
                "options": {
                    "baseURL": endpoint.openai_url,
                    "apiKey": endpoint.key,
                    "timeout": _PATIENCE_S * 1000,
                },
                "models": {MODEL: {"name": "Keepwarm", "tool_call": True, **limit}},
            }
        },
    }
    # As a variable and not as a file, it goes before a project's own opencode.json.
    return Configured(environment={"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _limit(endpoint: Endpoint) -> dict[str, int]:
    context = endpoint.context_tokens or 0
    return {"context": context, "output": min(8192, context // 4)}


def _qwen(endpoint: Endpoint, _: Path) -> Configured:
    return Configured(
        environment={
            "OPENAI_BASE_URL": endpoint.openai_url,
            "OPENAI_API_KEY": endpoint.key,
            "OPENAI_MODEL": MODEL,
            # Its sign-in is asked for otherwise where the user's settings name another one.
            "QWEN_DEFAULT_AUTH_TYPE": "openai",
        },
        arguments=("--auth-type", "openai", "--model", MODEL),
    )


def _pi(endpoint: Endpoint, home: Path) -> Configured:
    limit = _limit(endpoint) if endpoint.context_tokens else {"context": 32768, "output": 8192}
    model = {
        "id": MODEL,
        "name": "Keepwarm",
        "reasoning": False,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": limit["context"],
        "maxTokens": limit["output"],
    }
    provider = {
        "name": "Keepwarm",
        "baseUrl": endpoint.openai_url,
        "apiKey": endpoint.key,
        "api": "openai-completions",
        "models": [model],
    }
    # An extension and not models.json: that lies among the user's own settings and sessions.
    text = (
        "export default function (pi) {\n"
        f'  pi.registerProvider("keepwarm", {json.dumps(provider, indent=2)});\n'
        "}\n"
    )
    file = home / "keepwarm.ts"
    return Configured(
        files={file.name: text},
        arguments=("--extension", str(file), "--provider", "keepwarm", "--model", MODEL),
    )


def _aider(endpoint: Endpoint, _: Path) -> Configured:
    return Configured(
        environment={
            "OPENAI_API_BASE": endpoint.openai_url,
            "OPENAI_API_KEY": endpoint.key,
            "AIDER_MODEL": f"openai/{MODEL}",
            "AIDER_WEAK_MODEL": f"openai/{MODEL}",
            "AIDER_SHOW_MODEL_WARNINGS": "false",
            "AIDER_TIMEOUT": str(_PATIENCE_S),
        }
    )


def _hermes(endpoint: Endpoint, home: Path) -> Configured:
    model: dict[str, object] = {
        "provider": "custom",
        "default": MODEL,
        "base_url": endpoint.openai_url,
        "api_key": endpoint.key,
    }
    if endpoint.context_tokens:
        model["context_length"] = endpoint.context_tokens
    # JSON's scalars are YAML's, too.
    lines = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in model.items())
    return Configured(
        environment={"HERMES_HOME": str(home)}, files={"config.yaml": f"model:\n{lines}"}
    )


CLIENTS: Mapping[str, Client] = {
    client.name: client
    for client in (
        Client(
            name="claude",
            title="Claude Code",
            command="claude",
            install="npm install -g @anthropic-ai/claude-code",
            tried="2.1.332",
            configure=_claude,
            places=("~/.local/bin/claude", "~/.claude/local/claude"),
        ),
        Client(
            name="codex",
            title="Codex",
            command="codex",
            install="npm install -g @openai/codex",
            tried="0.171.0",
            configure=_codex,
        ),
        Client(
            name="opencode",
            title="OpenCode",
            command="opencode",
            install="npm install -g opencode-ai",
            tried="1.18.33",
            configure=_opencode,
            places=("~/.opencode/bin/opencode",),
        ),
        Client(
            name="qwen",
            title="Qwen Code",
            command="qwen",
            install="npm install -g @qwen-code/qwen-code",
            tried="0.24.4",
            configure=_qwen,
        ),
        Client(
            name="pi",
            title="pi",
            command="pi",
            install="npm install -g @earendil-works/pi-coding-agent",
            tried="1.6.0",
            configure=_pi,
        ),
        Client(
            name="aider",
            title="Aider",
            command="aider",
            install="python -m pip install aider-install && aider-install",
            tried="0.86.2",
            configure=_aider,
            places=("~/.local/bin/aider",),
        ),
        Client(
            name="hermes",
            title="Hermes",
            command="hermes",
            install="pip install hermes-agent",
            tried="",
            configure=_hermes,
            places=("~/.local/bin/hermes",),
        ),
    )
}
