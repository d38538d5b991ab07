"""`keepwarm doctor`: what costs warmth here, and what to do about it."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.doctor.collect import Target, collect
from keepwarm.doctor.diagnose import diagnose
from keepwarm.doctor.facts import ServerFacts
from keepwarm.doctor.finding import Finding, Severity, exit_status
from keepwarm.errors import ConfigError
from keepwarm.operate.address import own_key, own_url
from keepwarm.settings import Places, Settings

_STYLES = {
    Severity.ERROR: ("error", "bold red"),
    Severity.WARNING: ("warning", "yellow"),
    Severity.NOTE: ("note", "blue"),
    Severity.UNKNOWN: ("unknown", "magenta"),
}


def doctor(
    config: opt.ConfigFile = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            metavar="URL",
            help="A llama-server or a Keepwarm. [default: the one of the settings]",
        ),
    ] = None,
    slot_dir: opt.SlotDir = None,
    tiers: opt.Tiers = None,
    store: opt.StoreDir = None,
    force: Annotated[
        bool,
        typer.Option(
            "--try", help="Find out what isn't seen, even if two slots are overwritten for it."
        ),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Look at a deployment and say what costs warmth, and what to do.

    A bare llama-server is tried out where that leaves its slots as they were. Exit status: 0 if
    nothing is wrong, 1 with warnings, 2 with errors.
    """
    flags = {"engine.slot_dir": slot_dir, "tiers.dir": tiers, "store.dir": store}
    try:
        settings, places = opt.settings_from(config, flags)
    except ConfigError as error:
        findings = [Finding("settings", Severity.ERROR, str(error), "Mend it; nothing starts so.")]
        _report(None, findings, as_json=as_json)
        sys.exit(exit_status(findings))
    with err.status("looking"):
        facts = asyncio.run(collect(_asked(settings, places, upstream, force=force)))
    findings = diagnose(facts)
    _report(facts, findings, as_json=as_json)
    sys.exit(exit_status(findings))


def _asked(settings: Settings, places: Places, upstream: str | None, *, force: bool) -> Target:
    server = settings.server
    own = own_url(server)
    url = (upstream or own).rstrip("/")
    is_own = url == own
    key = settings.engine.upstream_key or None
    if is_own:
        key = own_key(server)
    return Target(
        url=url, settings=settings, places=places, is_own=is_own, api_key=key, force=force
    )


def _report(facts: ServerFacts | None, findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "url": facts.url if facts else None,
                "kind": facts.kind if facts else None,
                "findings": [finding.as_dict() for finding in findings],
                "exit_status": exit_status(findings),
            }
        )
        return
    for finding in findings:
        word, style = _STYLES[finding.severity]
        out.print(f"{word}: ", style=style, end="")
        out.print(finding.what, markup=False, soft_wrap=True)
        if finding.advice:
            out.print(f"  {finding.advice}", markup=False, soft_wrap=True)
    if facts and not any(f.severity >= Severity.WARNING for f in findings):
        kind = {"keepwarm": "Keepwarm", "llama-server": "llama-server"}.get(facts.kind, "")
        out.print(f"Nothing is wrong with the {kind} at {facts.url}.", markup=False)
