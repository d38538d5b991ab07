"""Collect the facts: ask the server, look at the machine, read the tiers and the store."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from keepwarm.core.tiers import Tier, compose
from keepwarm.core.volatile import Volatile, find_volatile
from keepwarm.doctor import kernel
from keepwarm.doctor.experiment import Tried, try_idle_slot
from keepwarm.doctor.facts import DiskFacts, ProcessFacts, ServerFacts, StoreFacts, TierFacts
from keepwarm.doctor.flags import ServerFlags, is_llama_server, read_flags
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.gguf_header import ModelHeader, read_model
from keepwarm.engine.static_end import static_tokens
from keepwarm.errors import EngineError, EngineRefusedError, ModelError, TierError
from keepwarm.keys import is_loopback
from keepwarm.settings import Places, Settings
from keepwarm.staging import default_staging
from keepwarm.store.checks import stores
from keepwarm.tiers.files import deployed_tiers

_HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the doctor looks at.

    `is_own` is whether it is the deployment that the settings describe, on this machine; `api_key`
    for its pages; `force` allows experiments that overwrite slots.
    """

    url: str
    settings: Settings
    places: Places
    is_own: bool
    api_key: str | None = None
    force: bool = False


async def collect(asked: Target) -> ServerFacts:
    """All that can be seen."""
    facts = ServerFacts(url=asked.url, kind="none", today=datetime.now().astimezone().date())
    facts = replace(facts, store=_store(asked), **_tier_texts(asked))
    client = EngineClient(asked.url, api_key=asked.api_key)
    try:
        status = await _keepwarm_status(asked)
        if status is not None and status.get("state") != "ready":
            # Whatever else is asked now would wait until it is.
            return replace(
                _without_server(facts, asked),
                kind="keepwarm",
                state=str(status.get("state")),
                status=str(status.get("status")),
            )
        props = await client.props()
        facts = _identified(facts, asked, status, props)
        facts = await _rendered(facts, asked, client)
        return await _tried(facts, asked, client) if status is None else facts
    except EngineError as error:
        return _without_server(replace(facts, failure=str(error)), asked)


async def _keepwarm_status(asked: Target) -> dict[str, Any] | None:
    """Keepwarm's status; None from a bare llama-server.

    Raises:
        EngineError: nothing answers, or nothing that can be read.
    """
    headers = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
    timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
    url = asked.url.rstrip("/") + "/keepwarm/status"
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(url) as reply,
        ):
            if reply.status == 404:
                return None
            raw = await reply.read()
            if reply.status != 200:
                raise EngineError(f"it answers with status {reply.status}: {raw[:200]!r}.")
            return dict(json.loads(raw))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise EngineError(f"{error or type(error).__name__}.") from error


def _identified(
    facts: ServerFacts, asked: Target, status: dict[str, Any] | None, props: dict[str, Any]
) -> ServerFacts:
    """What the server says of itself, and what its process and its model's file say."""
    pid, flags = _process(asked, status)
    header = _header(props, asked)
    generation = props.get("default_generation_settings") or {}
    warmed = [w for w in (status or {}).get("warmed", []) if w.get("tokens")]
    sizes = [w["bytes"] / w["tokens"] for w in warmed]
    return replace(
        facts,
        kind="llama-server" if status is None else "keepwarm",
        state=str((status or {}).get("state", "")),
        status=str((status or {}).get("status", "")),
        build=str(props.get("build_info") or ""),
        slots=int(props.get("total_slots") or 0) or None,
        slot_tokens=int(generation.get("n_ctx") or 0) or None,
        template=str(props.get("chat_template") or ""),
        flags=flags,
        memory=header.memory if header else None,
        window_tokens=header.window_tokens if header else 0,
        bytes_a_token=max(sizes, default=None),
        agents=_agents(status or {}),
        hygiene=tuple(map(str, (status or {}).get("hygiene", ()))),
        slot_dir=_slot_dir(asked, flags, is_keepwarm=status is not None),
        process=_machine(asked, pid, flags),
    )


def _agents(status: dict[str, Any]) -> tuple[str, ...]:
    """The coding agents among what was learned, by the names of kept prefixes."""
    names = (str(warmed.get("name", "")).partition("~")[2] for warmed in status.get("warmed", ()))
    return tuple(sorted({name for name in names if name}))


def _without_server(facts: ServerFacts, asked: Target) -> ServerFacts:
    """What can be seen of a deployment that doesn't run."""
    if not asked.is_own:
        return replace(facts, process=ProcessFacts(machine_cores=kernel.usable_cores()))
    header = _header({}, asked)
    return replace(
        facts,
        memory=header.memory if header else None,
        window_tokens=header.window_tokens if header else 0,
        slot_dir=_slot_dir(asked, None, is_keepwarm=True),
        process=_machine(asked, None, None),
    )


def _process(asked: Target, status: dict[str, Any] | None) -> tuple[int | None, ServerFlags | None]:
    """The engine's process and its flags, where it runs on this machine and may be seen."""
    address = urlsplit(asked.url)
    if not _is_here(address.hostname):
        return None, None
    if status is not None:
        pid = status.get("engine_pid")
    else:
        pid = kernel.listening_pid(address.port or 80)
    command = kernel.command_line(pid) if pid else None
    # The embedded engine has no command line; its parameters are Keepwarm's own.
    flags = read_flags(command) if command and is_llama_server(command) else None
    return pid, flags


def _is_here(host: str | None) -> bool:
    return host == "localhost" or is_loopback(host or "")


def _header(props: dict[str, Any], asked: Target) -> ModelHeader | None:
    path = str(props.get("model_path") or (asked.settings.engine.model if asked.is_own else ""))
    if not path or not _is_here(urlsplit(asked.url).hostname):
        return None
    try:
        return read_model(Path(path).expanduser())
    except ModelError:
        return None


def _slot_dir(asked: Target, flags: ServerFlags | None, *, is_keepwarm: bool) -> DiskFacts | None:
    """Where slot files pass through, as seen from here."""
    settings = asked.settings
    named = settings.engine.slot_dir or (flags.slot_dir if flags else "") or ""
    if is_keepwarm and asked.is_own:
        store = _store_dir(asked)
        named = settings.store.staging_dir or str(
            default_staging(store, need_bytes=settings.store.staging_bytes)
        )
    return kernel.look_at_disk(_nearest(Path(named).expanduser())) if named else None


def _machine(asked: Target, pid: int | None, flags: ServerFlags | None) -> ProcessFacts:
    threads = flags.threads if flags else None
    if asked.is_own:
        threads = threads or asked.settings.engine.threads or None
    here = _is_here(urlsplit(asked.url).hostname)
    cores = kernel.usable_cores()
    # Whose threads aren't known is taken to run as many as it may.
    known = here and (pid is not None or asked.is_own)
    return ProcessFacts(
        pid=pid,
        swapped_bytes=kernel.swapped_bytes(pid) if pid else None,
        threads=threads if known else cores,
        cores=cores,
        machine_cores=kernel.machine_cores(),
        load=kernel.load() if here else None,
    )


def _store_dir(asked: Target) -> Path:
    settings = asked.settings
    return Path(settings.store.dir).expanduser() if settings.store.dir else asked.places.store


def _store(asked: Target) -> StoreFacts | None:
    root = _store_dir(asked)
    if not root.is_dir():
        return None
    disk = kernel.look_at_disk(root)
    if disk is None:
        return None
    listed = stores(root)
    idle = [store for store in listed if store.owner is None]
    return StoreFacts(
        disk=disk,
        used_bytes=sum(store.size_bytes for store in listed),
        quota_bytes=asked.settings.store.quota_bytes,
        pins=sum(store.pins for store in listed),
        is_open=len(idle) < len(listed),
        idle_stores=len(idle),
        idle_bytes=sum(store.size_bytes for store in idle),
    )


def _tier_texts(asked: Target) -> dict[str, Any]:
    """The tiers' own texts, without a server."""
    try:
        tiers = _load(asked)
    except TierError as error:
        return {"tiers_failure": str(error)}
    return {"tiers": tuple(TierFacts(name=t.name, volatile=_volatile(t)) for t in tiers)}


def _load(asked: Target) -> list[Tier]:
    return list(deployed_tiers(asked.settings.tiers, asked.places)[1])


def _volatile(tier: Tier) -> tuple[tuple[str, Volatile], ...]:
    """Places in what this tier itself brings; its base has a report of its own."""
    own = [segment for segment in tier.segments if segment.tier == tier.name]
    name = "system.md" if tier.extends is None else "context.md"
    out = [(name, found) for segment in own for found in find_volatile(segment.text)]
    if tier.tools:
        text = json.dumps(list(tier.tools), indent=1, ensure_ascii=False)
        out += [("tools.json", found) for found in find_volatile(text)]
    return tuple(out)


async def _rendered(facts: ServerFacts, asked: Target, client: EngineClient) -> ServerFacts:
    """What the model's template makes of a short conversation and of each tier."""
    try:
        facts = replace(facts, rendered=await client.render({"messages": _HELLO}))
    except EngineError:
        return facts
    if not facts.tiers:
        return facts
    tiers = [
        await _render_tier(client, tier, known)
        for tier, known in zip(_load(asked), facts.tiers, strict=True)
    ]
    return replace(facts, tiers=tuple(tiers))


async def _render_tier(client: EngineClient, tier: Tier, known: TierFacts) -> TierFacts:
    static = compose(tier, {"messages": []})
    try:
        tokens = await static_tokens(PromptCounter(client), static)
        rendered = await client.render({**static, "messages": [*static["messages"], _HELLO[1]]})
    except EngineRefusedError as error:
        return replace(known, failure=str(error))
    names = [tool["function"]["name"] for tool in tier.tools]
    missing = tuple(name for name in names if name not in rendered)
    return replace(known, tokens=len(tokens), missing_tools=missing)


async def _tried(facts: ServerFacts, asked: Target, client: EngineClient) -> ServerFacts:
    """What a small experiment tells of a bare server."""
    slot_dir = Path(facts.slot_dir.path) if facts.slot_dir else None
    try:
        tried = await try_idle_slot(
            client,
            slots=facts.slots or 1,
            memory=facts.memory,
            slot_dir=slot_dir,
            force=asked.force,
        )
    except EngineError as error:
        tried = Tried(None, f"the server failed while it was tried out: {error}")
    by_flags = bool(facts.flags.slot_dir) if facts.flags else None
    return replace(
        facts,
        keeps_idle=tried.keeps_idle,
        untried=tried.reason,
        can_save=tried.can_save if tried.can_save is not None else by_flags,
        bytes_a_token=tried.bytes_a_token,
    )


def _nearest(path: Path) -> Path:
    """The path, or the folder above it that exists already."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
