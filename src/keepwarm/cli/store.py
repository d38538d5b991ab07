"""`keepwarm store`: what is saved, whether it is sound, and carrying it elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.progress import Progress
from rich.tree import Tree

from keepwarm.cli import options as opt
from keepwarm.cli.gateway import DEFAULT_URL, Gateway, GatewayError, Url
from keepwarm.cli.inspect import describe
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.explain.history import FILE_NAME, forget_requests
from keepwarm.slotfile import Layout
from keepwarm.store import checks
from keepwarm.store.container import read_container
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.store import Store
from keepwarm.store.types import Listed

app = typer.Typer(help="See, check and carry saved KV state.", no_args_is_help=True)

T = TypeVar("T")
_QUOTA = Annotated[
    int | None,
    typer.Option(
        "--quota", metavar="BYTES", help="Keep at most this. [default: store.quota_bytes]"
    ),
]


def _root(config: Path | None, store: str | None) -> tuple[Path, int]:
    """The store's directory and its quota in bytes."""
    settings, places = opt.settings_from(config, {"store.dir": store})
    root = Path(settings.store.dir).expanduser() if settings.store.dir else places.store
    if not root.is_dir():
        raise ConfigError(
            f"There is no store at {root}. It is made when a gateway starts; name another with "
            "--store DIR."
        )
    return root, settings.store.quota_bytes


@app.command("ls")
def list_store(
    config: opt.ConfigFile = None, store: opt.StoreDir = None, as_json: opt.Json = False
) -> None:
    """Show the saved prefixes as a tree: tokens, own and shared bytes, use, and what each spares.

    Works beside a running gateway.
    """
    root, quota_bytes = _root(config, store)
    found = []
    for one in checks.stores(root):
        extents = checks.list_extents(root, one.name)
        found.append({**msgspec.to_builtins(one), "list": msgspec.to_builtins(extents)})
        if not as_json:
            _show_store(one, extents)
    if as_json:
        print_json({"directory": str(root), "quota_bytes": quota_bytes, "stores": found})
    elif not found:
        out.print(f"{root} holds no snapshots yet.")


def _show_store(one: checks.StoreListed, extents: list[Listed]) -> None:
    form = "whole snapshots" if one.layout == "whole" else "rows, each token's once"
    owner = f", open in {one.owner}" if one.owner else ""
    tree = Tree(
        f"{one.fingerprint[:12]}: {one.size_bytes / 1e6:,.1f} MB in {one.extents} extents, "
        f"{form}{owner}"
    )
    nodes: dict[int, Tree] = {}
    for extent in extents:
        parent = nodes.get(extent.parent) if extent.parent is not None else None
        nodes[extent.extent_id] = (parent or tree).add(_line(extent))
    out.print(tree)


def _line(extent: Listed) -> str:
    # Rows are all of one size, so what is shared follows from where the extent begins.
    shared_bytes = extent.lo * extent.size_bytes / max(extent.hi - extent.lo, 1)
    name = ", ".join(_short(pin) for pin in extent.pins) or extent.origin.value
    shared = f" on {shared_bytes / 1e6:.1f} MB shared" if shared_bytes else ""
    used = _ago(extent.used_s) if extent.uses else "never used"
    return (
        f"#{extent.extent_id} {name}: tokens {extent.lo:,}-{extent.hi:,}, "
        f"{extent.size_bytes / 1e6:.2f} MB{shared}, {used}, {extent.uses} uses, "
        f"spares {extent.prefill_s:.1f} s"
    )


def _short(pin: str) -> str:
    if not pin.startswith("learned:"):
        return pin
    plain, _, agent = pin.partition("~")
    return f"{plain[: plain.rindex(':') + 9]} {agent}".rstrip()


def _ago(then_s: float) -> str:
    seconds = max(time.time() - then_s, 0)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"used {seconds / size:.0f} {unit} ago"
    return "used just now"


@app.command()
def verify(
    config: opt.ConfigFile = None, store: opt.StoreDir = None, as_json: opt.Json = False
) -> None:
    """Read everything again and compare checksums; changes nothing. Exit status 1 on findings.

    What is damaged is quarantined by the gateway itself at its next use.
    """
    root, _ = _root(config, store)
    report = []
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        for one in checks.stores(root):
            bar = progress.add_task(one.fingerprint[:12], total=None)

            def on_progress(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            result = checks.verify_files(root, one.name, on_progress)
            report.append({"fingerprint": one.fingerprint, **msgspec.to_builtins(result)})
    findings = [finding for read in report for finding in read["findings"]]
    if as_json:
        print_json({"directory": str(root), "stores": report})
    else:
        for read in report:
            out.print(
                f"{read['fingerprint'][:12]}: {read['extents']} extents, "
                f"{read['read_bytes'] / 1e6:,.1f} MB read, {len(read['findings'])} findings"
            )
        for finding in findings:
            out.print(f"  {finding['about']}: {finding['what']}")
    if findings:
        sys.exit(1)


@app.command()
def prune(
    config: opt.ConfigFile = None,
    store: opt.StoreDir = None,
    quota: _QUOTA = None,
    as_json: opt.Json = False,
) -> None:
    """Remove what isn't needed, and evict what is worth least until all is within the quota.

    Also when the disk is full. What was set aside or quarantined, and files that no index names, go
    in any case; then what other models and engines left, the longest unused first. Pinned prefixes
    of the store used last stay. A running gateway keeps its quota itself and is left alone.
    """
    root, quota_bytes = _root(config, store)
    try:
        pruned = checks.prune_root(root, quota if quota is not None else quota_bytes)
    except SnapshotError as error:
        raise ConfigError(f"It can't be done: {error}.") from error
    if as_json:
        print_json({"directory": str(root), "stores": msgspec.to_builtins(pruned)})
        return
    for one in pruned:
        name = (one.fingerprint or one.name)[:12]
        if one.owner:
            out.print(f"{name}: left alone, {one.owner} has it open")
        elif one.why_not:
            out.print(f"{name}: left alone, {one.why_not}")
        else:
            what = "all of it" if one.is_gone else f"{one.extents} extents"
            out.print(f"{name}: removed {what}, {one.size_bytes / 1e6:,.1f} MB")
    if not pruned:
        out.print(f"{root} holds no snapshots.")


@app.command("rm")
def remove(
    key: Annotated[
        str, typer.Option("--key", metavar="NAME", help="Name of the API key whose data goes.")
    ],
    config: opt.ConfigFile = None,
    store: opt.StoreDir = None,
    url: Url = DEFAULT_URL,
    operator_key: Annotated[
        str | None,
        typer.Option(
            "--operator-key",
            metavar="KEY",
            help="An operator's API key, for a running gateway. [default: KEEPWARM_API_KEY]",
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Forget an API key: what was saved for it alone, its pins, its requests' history.

    A running gateway is asked to (`--url`); what nobody has open is changed here. What all keys
    share stays, and so do the key itself and its batches. Exit status 1 if anything is left.
    """
    if not key:
        raise ConfigError("Name an API key: --key NAME.")
    root, _ = _root(config, store)
    with _refusals():
        done = checks.forget_key(root, key)
    lines = [_forgotten(msgspec.to_builtins(one)) for one in done if one.owner is None]
    owned = [one for one in done if one.owner is not None]
    if owned:
        lines += _forget_running(root, key, owned, url=url, operator_key=operator_key)
    else:
        history = root / FILE_NAME
        requests = forget_requests(history, key) if history.exists() else 0
        lines.append({"name": FILE_NAME, "requests": requests, "is_left": requests is None})
    if as_json:
        print_json({"directory": str(root), "key": key, "removed": lines})
    else:
        for line in lines:
            out.print(_forgotten_line(line))
    if any(line["is_left"] for line in lines):
        sys.exit(1)


def _forget_running(
    root: Path,
    key: str,
    owned: list[checks.ForgottenStore],
    *,
    url: str,
    operator_key: str | None,
) -> list[dict[str, Any]]:
    """Ask the gateway at `url`; stores that are open in another one are left, and told."""

    async def ask() -> dict[str, Any]:
        async with Gateway(url, operator_key) as gateway:
            return await gateway.post("store/forget", {"key": key})

    why, told = "", None
    try:
        told = asyncio.run(ask())
    except GatewayError as error:
        why = str(error)
    lines: list[dict[str, Any]] = []
    for one in owned:
        if told is not None and Path(told["directory"]).resolve() == (root / one.name).resolve():
            is_left = told["busy_slots"] > 0 or told["requests"] is None
            rest = {"busy_slots": told["busy_slots"], "requests": told["requests"]}
            lines.append({"name": one.name, **told["store"], **rest, "is_left": is_left})
        else:
            left = why or f"{one.owner} has it open, not the gateway at {url}"
            lines.append({"name": one.name, "why_not": left, "is_left": True})
    return lines


def _forgotten(one: dict[str, Any]) -> dict[str, Any]:
    if one["why_not"]:
        return {"name": one["name"], "why_not": one["why_not"], "is_left": True}
    return {"name": one["name"], **one["told"], "is_left": False}


def _forgotten_line(line: dict[str, Any]) -> str:
    name = line["name"][:12] if "size_bytes" in line else line["name"]
    if line.get("why_not"):
        return f"{name}: left as it is, {line['why_not']}"
    said = []
    if "size_bytes" in line:
        said.append(f"{line['extents']} extents of {line['size_bytes'] / 1e6:,.1f} MB")
        said.append(f"{len(line['pins'])} pins")
        if line["refuse_bytes"]:
            said.append(f"{line['refuse_bytes'] / 1e6:,.1f} MB that was set aside")
    if "requests" in line:
        requests = line["requests"]
        said.append(
            "no requests (it can't be written)" if requests is None else f"{requests} requests"
        )
    if line.get("busy_slots"):
        said.append(f"but {line['busy_slots']} slots compute for it still: end them, ask again")
    return f"{name}: removed {', '.join(said)}"


@app.command()
def export(
    what: Annotated[
        str, typer.Argument(metavar="TIER", help="A tier's name, or a pin's as `ls` shows it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    config: opt.ConfigFile = None,
    store: opt.StoreDir = None,
) -> None:
    """Write one warm prefix to a file, for another machine with the same model and engine."""
    root, quota_bytes = _root(config, store)
    name = what if ":" in what else f"tier:{what}"
    holders = [
        one
        for one in checks.stores(root)
        if any(pin.name == name for pin in checks.list_pins(root, one.name))
    ]
    if not holders:
        raise ConfigError(f"Nothing called {what!r} is saved in {root}. See `keepwarm store ls`.")
    # The most recent index is that of the deployment last used.
    newest = max(holders, key=lambda s: (root / f"{s.name}.index").stat().st_mtime)
    layout = None if newest.layout == "whole" else Layout.from_json(newest.layout)

    async def write(opened: Store) -> int:
        return await opened.export(name, output)

    size = _with_store(root, newest.fingerprint, layout, write, quota_bytes=quota_bytes)
    out.print(f"{name}: {size / 1e6:.1f} MB written to {output}")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="What `keepwarm store export` wrote.")],
    config: opt.ConfigFile = None,
    store: opt.StoreDir = None,
) -> None:
    """Take in an exported prefix; the next start with that model and engine finds it warm."""
    settings, places = opt.settings_from(config, {"store.dir": store})
    root = Path(settings.store.dir).expanduser() if settings.store.dir else places.store
    try:
        header = read_container(file).header
    except SnapshotError as error:
        raise ConfigError(f"{file} can't be imported: {error}.") from error
    layout = Layout.from_json(header.layout) if header.layout else None

    async def read(opened: Store) -> int:
        imported = await opened.import_(file)
        return len(imported.tokens)

    quota_bytes = settings.store.quota_bytes
    tokens = _with_store(root, header.fingerprint, layout, read, quota_bytes=quota_bytes)
    out.print(f"{header.pin or 'a prefix'}: {tokens:,} tokens imported into {root}")


def _with_store(
    root: Path,
    fingerprint: str,
    layout: Layout | None,
    work: Callable[[Store], Any],
    *,
    quota_bytes: int,
) -> Any:
    """Open a store that no gateway has open, for one piece of work."""

    async def run() -> Any:
        with _refusals(), tempfile.TemporaryDirectory(prefix="keepwarm-") as scratch:
            opened = await Store.open(
                ShelfSettings(
                    root=root,
                    fingerprint=fingerprint,
                    layout=layout,
                    quota_bytes=quota_bytes,
                    staging=Path(scratch),
                    staging_bytes=0,
                    streams=1,
                    max_tokens=1 << 30,
                    owner=f"keepwarm store, process {os.getpid()}",
                ),
                must_last=True,
            )
            try:
                return await work(opened)
            finally:
                await opened.close()

    return asyncio.run(run())


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except SnapshotError as error:
        raise ConfigError(f"It can't be done: {error}.") from error


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A slot file, or an exported prefix.")],
    as_json: opt.Json = False,
) -> None:
    """Explain any slot file: version, tokens, layers, memory kind, and where the bytes are."""
    report = describe(file)
    if as_json:
        print_json(report)
        return
    for key, value in report.items():
        out.print(f"{key.replace('_', ' '):20} {value}")
