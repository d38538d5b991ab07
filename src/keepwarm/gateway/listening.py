"""Where the gateway listens: a TCP port, with TLS or without, or a Unix socket; and for how long it
waits for somebody who says nothing."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from pathlib import Path

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from keepwarm.api.dialect import OPENAI
from keepwarm.errors import ConfigError
from keepwarm.settings import ServerSettings

# A request's head must be there by then, and a kept connection is used again by then.
_HEAD_S = 75.0
_BACKLOG = 1024


def is_unix(host: str) -> bool:
    """Whether an address to listen on is a Unix socket's path, as llama-server tells it."""
    return host.endswith(".sock")


class HttpRunner(web.AppRunner):
    """Serves an application; what isn't HTTP is refused in JSON, too."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, keepalive_timeout=_HEAD_S)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Tell who sent something else than HTTP so, in JSON, and close the connection."""
        super().handle_error(request, status, exc, message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        said = (message or "This can't be read as HTTP.").strip().partition("\n")[0]
        response = web.Response(
            body=OPENAI.error(said, kind=kind, status=status),
            status=status,
            content_type="application/json",
        )
        response.force_close()
        return response


async def listen(runner: web.AppRunner, settings: ServerSettings) -> str:
    """Begin to listen.

    Returns:
        the address, as a client writes it.

    Raises:
        ConfigError: the address or the certificate can't be used.
    """
    tls = _tls(settings)
    try:
        if is_unix(settings.host):
            return await _listen_unix(runner, Path(settings.host).expanduser(), tls)
        site = web.TCPSite(runner, settings.host, settings.port, backlog=_BACKLOG, ssl_context=tls)
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {settings.port} on {settings.host} is in use by another program. Stop it, "
                "or choose another port with --port."
            ) from error
        raise ConfigError(
            f"Can't listen on {settings.host}:{settings.port}: {error.strerror}."
        ) from error
    host, port = runner.addresses[0][:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


async def _listen_unix(runner: web.AppRunner, path: Path, tls: ssl.SSLContext | None) -> str:
    """Listen on a socket that only this user may open."""
    _remove_dead_socket(path)
    # It has its mode from its first moment on.
    mask = os.umask(0o177)
    try:
        await web.UnixSite(runner, path, backlog=_BACKLOG, ssl_context=tls).start()
    finally:
        os.umask(mask)
    return f"unix:{path}"


def _remove_dead_socket(path: Path) -> None:
    """Remove what a server that was killed has left.

    Raises:
        ConfigError: somebody listens there, or it is something else.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is there already and isn't a socket. Name another with --host.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"Another program listens on {path}. Stop it, or name another with --host.")


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    key, certificate = settings.ssl_key_file, settings.ssl_cert_file
    if not key and not certificate:
        return None
    if not key or not certificate:
        raise ConfigError(
            "TLS needs both a key and a certificate: --ssl-key-file and --ssl-cert-file."
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The certificate {certificate} with the key {key} can't be used: {error}."
        ) from error
    return context
