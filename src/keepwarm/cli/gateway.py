"""Options of the commands that ask a running gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from keepwarm.operate.gateway_client import DEFAULT_URL, Gateway, GatewayError

__all__ = ["DEFAULT_URL", "Gateway", "GatewayError", "Key", "Url"]

Url = Annotated[
    str,
    typer.Option(
        "--url", metavar="URL", help="Address of a running Keepwarm, or its socket's path."
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", help="API key, if it asks for one. [default: KEEPWARM_API_KEY]"
    ),
]
