"""`keepwarm serve`: the gateway and its engine."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from keepwarm.cli import options as opt
from keepwarm.engine.beginning import begin
from keepwarm.logs import set_up_logging
from keepwarm.settings import Places, Settings


def serve(
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ENGINE_ARGS", help="Passed to the --engine binary unchanged."),
    ] = None,
    config: opt.ConfigFile = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="FILE",
            help="GGUF model to serve; several: each is loaded when it is asked for.",
        ),
    ] = None,
    engine: opt.Engine = None,
    upstream: opt.Upstream = None,
    slot_dir: opt.SlotDir = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    store: opt.StoreDir = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            help="Address to listen on, or a path that ends in .sock. [default: 127.0.0.1]",
        ),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port. [default: 8090]")] = None,
    ssl_key_file: Annotated[
        str | None, typer.Option("--ssl-key-file", metavar="FILE", help="PEM key, for TLS.")
    ] = None,
    ssl_cert_file: Annotated[
        str | None, typer.Option("--ssl-cert-file", metavar="FILE", help="Its certificate.")
    ] = None,
) -> None:
    """Serve a model with every tier warm before the first request.

    Examples:

      keepwarm serve --model ~/models/qwen3-8b.gguf

      keepwarm serve --model m.gguf --engine ~/bin/llama-server -- -ngl 99

      keepwarm serve --model coder.gguf --model chat.gguf

      keepwarm serve --upstream http://127.0.0.1:8080 --slot-dir /dev/shm/slots
    """
    models = model or []
    flags = opt.engine_flags(
        model=models[0] if len(models) == 1 else None,
        engine=engine,
        upstream=upstream,
        slot_dir=slot_dir,
        slots=slots,
        context=context,
        threads=threads,
        tiers=tiers,
        chat_template=chat_template,
        store=store,
    )
    flags |= {
        "server.host": host,
        "server.port": port,
        "server.ssl_key_file": ssl_key_file,
        "server.ssl_cert_file": ssl_cert_file,
        "engine.extra": extra or None,
    }
    if len(models) > 1:
        flags |= opt.model_flags(models)
    settings, places = opt.settings_from(config, flags)
    set_up_logging(settings.log)
    asyncio.run(_begin_and_run(settings, places))


async def _begin_and_run(settings: Settings, places: Places) -> None:
    beginning = await begin(settings, places)
    try:
        # Imported while the engine loads: both take about as long, for a small model.
        from keepwarm.cli.serving import run  # noqa: PLC0415

        await run(settings, places, beginning)
    finally:
        await beginning.stop()
