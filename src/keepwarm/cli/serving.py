"""The life of `keepwarm serve` once its engine has begun to load."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from contextlib import suppress

from keepwarm.cli.output import err
from keepwarm.cli.progress import WarmProgress
from keepwarm.deployment.life import Life
from keepwarm.engine.beginning import Beginning
from keepwarm.errors import ConfigError
from keepwarm.gateway.app import make_app
from keepwarm.gateway.listening import HttpRunner, is_unix, listen
from keepwarm.keys import is_loopback
from keepwarm.sdnotify import Notifier
from keepwarm.service.presence import Presence, stop_timeout_s
from keepwarm.settings import Places, Settings, service_manager
from keepwarm.timeslice import ask_for_short_turns


async def run(settings: Settings, places: Places, beginning: Beginning) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the address can't be listened on.
        KeepwarmError: the engine or the tiers can't be used; everything begun was ended.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    presence = _presence(settings)

    def tell(status: str) -> None:
        progress.status(status)
        presence.status(status)

    with WarmProgress() as progress:
        life = Life(
            settings,
            places,
            on_status=tell,
            on_progress=progress.tokens,
            beginning=beginning,
        )
        _refuse_open_door(settings, has_keys=bool(life.keys))
        app = make_app(life)
        runner = HttpRunner(app)
        await runner.setup()
        try:
            address = await listen(runner, settings.server)
            starting = asyncio.create_task(life.start())
            pinging = asyncio.create_task(presence.ping(lambda: life.is_alive))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                with suppress(asyncio.CancelledError):
                    await starting
                return
            starting.result()
            progress.stop()
            # Start-up leaves some hundred thousand objects that never die; without them a
            # collection in the middle of a stream takes microseconds.
            gc.collect()
            gc.freeze()
            # Threads that explain and save must not hold up a token for the default 5 ms.
            sys.setswitchinterval(0.0005)
            ask_for_short_turns()
            for warmed in life.deployment.prefixes.warmed:
                err.print(
                    f"{warmed.name.removeprefix('tier:'):12} {warmed.tokens:6,} tokens "
                    f"{warmed.how} in {warmed.seconds:.2f} s"
                )
            err.print(f"keepwarm is ready on {address}")
            presence.ready()
            await stopping
            err.print("stopping")
            presence.stopping()
            await life.stop()
            pinging.cancel()
        finally:
            await runner.cleanup()
            presence.close()


def _presence(settings: Settings) -> Presence:
    systemd = service_manager()
    return Presence(
        Notifier(systemd.notify_socket),
        watchdog_s=systemd.watchdog_s,
        load_s=settings.engine.start_timeout_s,
        stop_s=stop_timeout_s(settings),
    )


def _refuse_open_door(settings: Settings, *, has_keys: bool) -> None:
    host = settings.server.host
    if not is_unix(host) and not is_loopback(host) and not has_keys:
        raise ConfigError(
            f"Listening on {host} would let everyone on the network use this model and see by "
            "timing what others asked it. Set an API key (server.api_keys or "
            "server.api_key_file), or listen on 127.0.0.1."
        )
