"""Rules about what is rendered: the template, and the tiers' own texts. Pure."""

from __future__ import annotations

import re

from keepwarm.core.volatile import find_volatile
from keepwarm.doctor.facts import ServerFacts
from keepwarm.doctor.finding import Finding, Severity

# By what an agent calls itself: tokens of the first request without the rule and with it, on
# recorded sessions (docs/use-with.md, "The block that changes").
_AGENTS = {
    "claude-cli": "(another directory: 20,535 tokens of 21,062; with the rule 1,814)",
    "opencode": "(another directory: 5,977 tokens of 8,023; with the rule 143)",
    "pi/": "(another directory: 902 tokens of 1,559; with the rule 26)",
    "qwencode": "(its memory of the project stands in front of its tools)",
}
_CLOCK = re.compile(r"\bstrftime_now\b|\bdate_string\b")


def tiers_unusable(facts: ServerFacts) -> Finding | None:
    """The tiers can't be read."""
    if not facts.tiers_failure:
        return None
    return Finding(
        "tiers_unusable", Severity.ERROR, facts.tiers_failure, "Mend the file that it names."
    )


def tier_unrendered(facts: ServerFacts) -> Finding | None:
    """The model's template refuses a tier."""
    failed = [tier for tier in facts.tiers if tier.failure]
    if not failed:
        return None
    return Finding(
        "tier_unrendered",
        Severity.ERROR,
        f"The model's template can't render the {failed[0].name} tier: {failed[0].failure}",
        "See `context_role` in docs/prompt-tiers.md: some templates take one system message only.",
    )


def template_drops_tools(facts: ServerFacts) -> Finding | None:
    """The model never hears of its tools."""
    dropped = [tier for tier in facts.tiers if tier.missing_tools]
    if not dropped:
        return None
    names = ", ".join(dropped[0].missing_tools[:3])
    return Finding(
        "template_drops_tools",
        Severity.ERROR,
        f"The model's chat template drops the tools of the {dropped[0].name} tier "
        f"({len(dropped[0].missing_tools)} aren't in the rendered prompt: {names}). The model "
        "never sees them.",
        "Give a template that renders tools (--chat-template, or --chat-template-file of a "
        "llama-server); for ChatML models configs/chat-templates/chatml-tools.jinja does.",
    )


def template_changes(facts: ServerFacts) -> Finding | None:
    """The template itself brings today's date into every prompt."""
    if facts.template is None or facts.rendered is None:
        return None
    year = str(facts.today.year)
    moving = [
        found
        for found in find_volatile(facts.rendered)
        if found.kind in ("date", "time") and year in found.excerpt
    ]
    if not moving and not (_CLOCK.search(facts.template) and _has_today(facts)):
        return None
    shown = f': "{moving[0].excerpt}"' if moving else ""
    return Finding(
        "template_changes",
        Severity.ERROR,
        f"The model's chat template writes today's date into the prompt{shown}. At midnight every "
        "prompt begins differently, and all that was warm is cold.",
        "Give a copy of the template with a fixed date, or none, with --chat-template "
        "(--chat-template-file of a llama-server).",
    )


def _has_today(facts: ServerFacts) -> bool:
    """Whether the rendered text has today's day, month and year near each other."""
    today = facts.today
    months = rf"(?:{today:%B}|{today:%b}|{today.month:02d})"
    day, year = rf"\b0?{today.day}\b", str(today.year)
    text = facts.rendered or ""
    forms = (
        rf"{day}\W+{months}\W+{year}",
        rf"{months}\W+{day}\W+{year}",
        rf"{year}\W{months}\W{day}",
    )
    return any(re.search(form, text, re.IGNORECASE) for form in forms)


def volatile_tiers(facts: ServerFacts) -> Finding | None:
    """A tier's text holds something that will be another tomorrow or elsewhere."""
    places = [(tier.name, place) for tier in facts.tiers for place in tier.volatile]
    if not places:
        return None
    shown = [
        f"{tier}/{file}:{found.line} ({found.kind}: {found.excerpt})"
        for tier, (file, found) in places[:5]
    ]
    more = f", and {len(places) - 5} more" if len(places) > 5 else ""
    return Finding(
        "volatile_tiers",
        Severity.WARNING,
        "The tiers hold what changes with the day, the machine or the run: "
        f"{'; '.join(shown)}{more}. When it changes, everything below it is prefilled again.",
        "Move it into the request, or to the very end of the largest tier.",
    )


def agents_change(facts: ServerFacts) -> Finding | None:
    """Coding agents ask here whose prompts change in front, and nothing is done about it."""
    told = {
        agent: gain
        for agent in facts.agents
        for name, gain in _AGENTS.items()
        if agent.startswith(name)
    }
    if not told or "move-known" in facts.hygiene:
        return None
    which = "; ".join(f"{agent} {gain}" for agent, gain in told.items())
    return Finding(
        "agents_change",
        Severity.WARNING,
        "Coding agents ask here that tell the directory, the day or the repository's status in "
        f"front of their tools, so a new one prefills what stands behind it again: {which}.",
        'Name the rule in keepwarm.toml: hygiene.rules = ["move-known"]; docs/use-with.md tells '
        "what it moves. A gateway that `keepwarm run` starts has it.",
    )
