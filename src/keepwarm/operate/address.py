"""Where the deployment of these settings is reached from this machine, and with which key."""

from __future__ import annotations

from pathlib import Path

from keepwarm.errors import ConfigError
from keepwarm.settings import ServerSettings


def own_url(server: ServerSettings) -> str:
    """The gateway's address; one that listens everywhere is asked on the loopback address."""
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host  # noqa: S104 - compared
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"


def own_key(server: ServerSettings) -> str | None:
    """A key that the deployment takes: the first of its own.

    Raises:
        ConfigError: the key file can't be read.
    """
    lines = list(server.api_keys)
    if server.api_key_file:
        try:
            text = Path(server.api_key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"The API key file {server.api_key_file} can't be read: {error.strerror}."
            ) from error
        lines += [line.strip() for line in text.splitlines() if line.strip()[:1] not in ("", "#")]
    return lines[0].rpartition(":")[2].strip() if lines else None
