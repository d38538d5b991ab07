"""`keepwarm warmup`: warm a server that runs already, and prove it from outside."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import typer
from rich.table import Table

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.cli.progress import WarmProgress
from keepwarm.core.reply import counts_of
from keepwarm.core.tiers import Tier, compose
from keepwarm.deployment.life import Life
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineError
from keepwarm.settings import Places, Settings
from keepwarm.tiers.files import deployed_tiers

_DEFAULT_KEEPWARM = "http://127.0.0.1:8090"


@dataclass(frozen=True, slots=True)
class Proof:
    """What a request of an ordinary client found of one tier."""

    tier: str
    cached_tokens: int
    prefilled_tokens: int
    warm: bool


def warmup(
    config: opt.ConfigFile = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            metavar="URL",
            help="A running llama-server or Keepwarm. [default: http://127.0.0.1:8090]",
        ),
    ] = None,
    slot_dir: opt.SlotDir = None,
    tiers: opt.Tiers = None,
    store: opt.StoreDir = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, help="Wait so long for the server to listen."
        ),
    ] = 2.0,
    as_json: opt.Json = False,
) -> None:
    """Warm every tier on a running server, save what was prefilled, and prove it.

    A llama-server's slots are restored from the store or prefilled and saved; give its
    --slot-save-path as --slot-dir. A Keepwarm warms itself: here it is asked, and proved. Exit
    status 0 only when a request on each tier reuses all of the tier's tokens.
    """
    flags = {
        "engine.upstream": upstream or _DEFAULT_KEEPWARM,
        "engine.slot_dir": slot_dir,
        "tiers.dir": tiers,
        "store.dir": store,
    }
    settings, places = opt.settings_from(config, flags)
    report = asyncio.run(_warmup(settings, places, wait_s=wait))
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["warm"]:
        err.print("not all tiers are warm", style="red")
        sys.exit(1)


async def _warmup(settings: Settings, places: Places, *, wait_s: float) -> dict[str, Any]:
    with WarmProgress() as progress:
        progress.status("waiting for the server")
        status = await _keepwarm_status(settings, wait_s=wait_s)
        if status is not None:
            _, tiers = deployed_tiers(settings.tiers, places)
            warmed = status["warmed"]
        else:
            life = Life(
                settings,
                places,
                on_status=progress.status,
                on_progress=progress.tokens,
                leaves=True,
            )
            await life.start()
            tiers = life.deployment.tiers
            warmed = [w.as_dict() for w in life.deployment.prefixes.warmed]
            await life.stop(drain=False)
        progress.status("proving")
        wanted = settings.tiers.warm
        proofs = await _prove(
            settings,
            [tier for tier in tiers if not wanted or tier.name in wanted],
            tokens={w["name"].removeprefix("tier:"): w["tokens"] for w in warmed},
            is_keepwarm=status is not None,
        )
    by_tier = {proof.tier: proof for proof in proofs}
    rows = [w | _proof_row(by_tier.get(w["name"].removeprefix("tier:"))) for w in warmed]
    return {
        "server": settings.engine.upstream,
        "kind": "keepwarm" if status is not None else "llama-server",
        "tiers": [row for row in rows if row["name"].startswith("tier:")],
        "warm": bool(proofs) and all(proof.warm for proof in proofs),
    }


def _proof_row(proof: Proof | None) -> dict[str, Any]:
    if proof is None:
        return {"warm": None}
    return {"warm": proof.warm, "request_cached_tokens": proof.cached_tokens}


async def _keepwarm_status(settings: Settings, *, wait_s: float) -> dict[str, Any] | None:
    """The status of a Keepwarm once it is ready; None if the server is a bare llama-server.

    `wait_s` is how long nobody may listen there: a service that was started just now, say.
    """
    url = settings.engine.upstream.rstrip("/") + "/keepwarm/status"
    deadline_s = settings.engine.start_timeout_s
    patience_s = time.monotonic() + wait_s
    async with aiohttp.ClientSession() as session, asyncio.timeout(deadline_s):
        while True:
            try:
                async with session.get(url, headers=_headers(settings)) as reply:
                    if reply.status == 404:
                        return None
                    body: dict[str, Any] = await reply.json() if reply.status == 200 else {}
            except aiohttp.ClientError:
                if time.monotonic() >= patience_s:
                    return None  # the engine says what is wrong with the address
                body = {}
            if body.get("state") == "ready":
                return body
            await asyncio.sleep(0.2)


def _headers(settings: Settings) -> dict[str, str]:
    key = settings.engine.upstream_key
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _prove(
    settings: Settings, tiers: Sequence[Tier], *, tokens: dict[str, int], is_keepwarm: bool
) -> list[Proof]:
    """One short request on each tier, as a client would send it."""
    client = EngineClient(settings.engine.upstream, api_key=settings.engine.upstream_key or None)
    return [
        await _prove_one(client, tier, tokens.get(tier.name, 0), is_keepwarm=is_keepwarm)
        for tier in tiers
    ]


async def _prove_one(client: EngineClient, tier: Tier, tokens: int, *, is_keepwarm: bool) -> Proof:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Say ok."}],
        "max_tokens": 1,
        "temperature": 0,
    }
    body = body | {"model": tier.name} if is_keepwarm else compose(tier, body)
    counts = counts_of(await client.chat(body))
    if counts is None:
        raise EngineError("The server's reply holds no counts, so nothing can be proved.")
    warm = tokens > 0 and counts.cached >= tokens
    return Proof(tier.name, counts.cached, counts.prefilled, warm)


def _show(report: dict[str, Any]) -> None:
    table = Table("tier", "tokens", "how", "prefilled", "seconds", "MB", "a request reuses")
    for row in report["tiers"]:
        warm = {True: "all of it", False: "NOT ALL", None: "not asked"}[row["warm"]]
        table.add_row(
            row["name"].removeprefix("tier:"),
            f"{row['tokens']:,}",
            row["how"],
            f"{row['prefilled_tokens']:,}",
            f"{row['seconds']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            warm,
        )
    out.print(table)
