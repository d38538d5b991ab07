"""`keepwarm tiers`: the tiers as a token tree against the running model."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.tree import Tree

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.core.memory import MemoryKind
from keepwarm.core.tiers import Tier, TierSet, compose
from keepwarm.core.volatile import find_volatile
from keepwarm.deployment.warm import KeptPrefix, tier_prefixes
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.launch import Launch
from keepwarm.engine.session import engine_session
from keepwarm.engine.static_end import common_length
from keepwarm.settings import Settings
from keepwarm.tiers.files import deployed_tiers


def tiers_command(
    config: opt.ConfigFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    upstream: opt.Upstream = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    as_json: opt.Json = False,
) -> None:
    """Show each tier's tokens, what it shares with the next, and where the template puts tools.

    Needs a model: one to load for the moment (--model), or a running server (--upstream).
    """
    flags = {
        "engine.model": model,
        "engine.binary": engine,
        "engine.upstream": upstream,
        "engine.slots": 1,
        "engine.context": 4096,
        "tiers.dir": tiers,
        "engine.chat_template": chat_template,
    }
    settings, places = opt.settings_from(config, flags)
    directory, tier_set = deployed_tiers(settings.tiers, places)
    with err.status("asking the model"):
        report = asyncio.run(_report(settings, tier_set))
    report["directory"] = str(directory)
    if as_json:
        print_json(report)
    else:
        _show(report)


async def _report(settings: Settings, tiers: TierSet) -> dict[str, Any]:
    async with engine_session(settings.engine) as (client, launch):
        prefixes = await tier_prefixes(tiers, PromptCounter(client), fingerprint="")
        rows = []
        for index, (tier, prefix) in enumerate(zip(tiers, prefixes, strict=True)):
            rows.append(
                {
                    "name": tier.name,
                    "extends": tier.extends,
                    "description": tier.description,
                    "tokens": len(prefix.tokens),
                    "shared_with_base_tokens": _shared(tier, prefix, prefixes),
                    "tools": len(tier.tools),
                    "tools_at": await _tools_at(client, tier),
                    "volatile": _volatile(tier),
                    "note": _window_note(launch, len(prefix.tokens)),
                    "order": index,
                }
            )
    return {"model": launch.model.name if launch.model else "attached", "tiers": rows}


def _shared(tier: Tier, prefix: KeptPrefix, prefixes: list[KeptPrefix]) -> int:
    """Tokens that a tier and its base begin with alike."""
    base = next((t for t in prefixes if t.name == f"tier:{tier.extends}"), None)
    return common_length(base.tokens, prefix.tokens) if base else 0


async def _tools_at(client: EngineClient, tier: Tier) -> str | None:
    """Where in the rendered prompt the tools stand, in words."""
    if not tier.tools:
        return None
    probe = "Quartz probe 77"
    static = compose(tier, {"messages": [{"role": "user", "content": probe}]})
    rendered = await client.render(static)
    tools = rendered.find(tier.tools[0]["function"]["name"])
    system = rendered.find(tier.messages[0].text[:40])
    if tools > rendered.find(probe) >= 0:
        return "behind the user's message: nothing of them can be kept warm"
    if tools < system:
        return "before the first system message: every smaller tier parts there"
    return "behind the first system message"


def _volatile(tier: Tier) -> list[dict[str, Any]]:
    found = []
    for segment in tier.segments:
        if segment.tier != tier.name:
            continue  # the base's own report has it
        found += [
            {"line": v.line, "column": v.column, "kind": v.kind, "text": v.excerpt}
            for v in find_volatile(segment.text)
        ]
    return found


def _window_note(launch: Launch, tokens: int) -> str | None:
    """What a sliding window costs a short prefix; see docs/snapshot-store.md."""
    model = launch.model
    if not model or model.memory is not MemoryKind.SLIDING_WINDOW:
        return None
    if tokens > model.window_tokens:
        return None
    return (
        f"not longer than the model's window ({model.window_tokens} tokens): kept warm in a slot, "
        "prefilled again after a restart"
    )


def _show(report: dict[str, Any]) -> None:
    out.print(f"Tiers of {report['directory']}, as {report['model']} renders them")
    nodes: dict[str, Tree] = {}
    roots: list[Tree] = []
    for row in report["tiers"]:
        own = row["tokens"] - row["shared_with_base_tokens"]
        label = f"{row['name']}: {row['tokens']:,} tokens"
        if row["extends"]:
            label += f" = {row['shared_with_base_tokens']:,} shared with {row['extends']} + {own:,}"
        parent = nodes.get(row["extends"] or "")
        node = parent.add(label) if parent else Tree(label)
        if not parent:
            roots.append(node)
        nodes[row["name"]] = node
        if row["tools"]:
            node.add(f"{row['tools']} tools, {row['tools_at']}")
        if row["note"]:
            node.add(row["note"])
        for volatile in row["volatile"]:
            node.add(
                f"line {volatile['line']} changes ({volatile['kind']}): {volatile['text']!r}; "
                "everything behind it is prefilled again when it does",
                style="yellow",
            )
    for root in roots:
        out.print(root)
