"""Who may ask a fleet's front: the same rules as at a node's door, for what the front answers.

Pure. Nodes judge what is passed on to them by themselves; the front's own pages tell of all nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.api.origins import Origins
from keepwarm.api.routes import Access, access_of
from keepwarm.errors import ForbiddenError
from keepwarm.keys import Keyring
from keepwarm.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules of one fleet."""

    origins: Origins
    keys: Keyring

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Refuse a request that may not come in, before its body is read.

        Raises:
            ForbiddenError: it is another site's, or comes under a name that any site could take.
            UnauthorizedError: it has no key.
        """
        access = access_of(path)
        if refusal := self.origins.refusal(access, method, headers):
            raise ForbiddenError(refusal)
        if access in (Access.API, Access.OWN) and method != "OPTIONS":  # a preflight has no key
            self.keys.namespace(headers)


def admission_of(server: ServerSettings, keys: Keyring) -> Admission:
    """The rules that settings name."""
    named = tuple(origin.lower().rstrip("/") for origin in server.cors_origins)
    hosts = tuple(host.lower() for host in server.hosts)
    return Admission(Origins(named, hosts, has_keys=bool(keys)), keys)


def is_page(method: str, path: str) -> bool:
    """Whether the front itself answers: what a preflight asks for isn't shown to it."""
    return method in ("GET", "HEAD") and path in ("/keepwarm/fleet", "/metrics")
