"""Which web sites may use us through somebody's browser.

Without keys whoever reaches this address is let in, and any site could reach it from a browser
here: by a plain cross-site request, or by giving a name of its own our address (DNS rebinding). So
without keys a request must come from a page of this machine or of a site that the settings name,
under a name that no site can take. With keys a page must know the key; browsers never send it by
themselves, so then any site may ask, unless the settings name some.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from keepwarm.api.routes import Access

_LOCAL_SUFFIXES = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
# Programs that show web pages of their own; no web site can have such an origin.
_PROGRAMS = ("app://", "tauri://", "vscode-webview://", "vscode-file://")
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Origins:
    """The rules. `named` are the origins that the settings name, `hosts` further names of ours."""

    named: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    has_keys: bool = False

    def refusal(self, access: Access, method: str, headers: Mapping[str, str]) -> str:
        """Why a request may not come in; empty if it may. Preflights are asked for by `lets_in`."""
        host, origin = headers.get("Host", ""), headers.get("Origin", "")
        if access is Access.OPEN:
            return ""
        if not self.has_keys and not (is_local_name(host) or _name(host) in self.hosts):
            return (
                f"Keepwarm is asked for as {host[:100]!r}. Under a public name it needs an API key "
                "(server.api_keys), or the name in server.hosts."
            )
        if access is Access.SITE:
            return ""
        if origin:
            return "" if self.lets_in(access, host, origin) else self._refused(access, origin)
        site = headers.get("Sec-Fetch-Site", "")
        if not self.has_keys and site in ("cross-site", "same-site"):
            # Someone who follows a link to us, or a page that puts us into a picture or a form.
            is_link = headers.get("Sec-Fetch-Mode") == "navigate" and method in ("GET", "HEAD")
            if not is_link and (site == "cross-site" or access is Access.OWN):
                return self._refused(access, "another site")
        return ""

    def lets_in(self, access: Access, host: str, origin: str) -> bool:
        """Whether a page of this origin may ask and read the answer."""
        if origin.partition("://")[2].lower() == host.lower() != "":
            return True
        if access is Access.OPEN:
            return True
        if access is not Access.API:
            return False
        if self.named:
            return _ANY in self.named or origin.lower() in self.named
        return self.has_keys or is_local_origin(origin)

    def _refused(self, access: Access, origin: str) -> str:
        if access is not Access.API:
            return "Another web site may not use this page."
        return (
            f"Web pages of {origin[:100]} may not use this Keepwarm. Name them in "
            "server.cors_origins, or set API keys (server.api_keys)."
        )


@lru_cache(maxsize=64)
def is_local_name(host: str) -> bool:
    """Whether a name can't be one that some site has given our address."""
    name = _name(host)
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_LOCAL_SUFFIXES)
    return True


def is_local_origin(origin: str) -> bool:
    """Whether a page comes from this machine: a server on it, or a program."""
    origin = origin.lower()
    if origin.startswith(_PROGRAMS):
        return True
    scheme, _, host = origin.partition("://")
    if scheme not in ("http", "https"):
        return False
    name = _name(host)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _name(host: str) -> str:
    return re.sub(r":\d+$", "", host).strip("[]").lower()


_EXPOSED = (
    "X-Keepwarm-Request-Id, X-Keepwarm-Tier, X-Keepwarm-Plan, X-Keepwarm-Slot, X-Keepwarm-Filled, "
    "X-Keepwarm-Hygiene, Server-Timing, Retry-After"
)
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_,\s-]{1,2000}")


def reply_headers(origin: str) -> dict[str, str]:
    """What lets a page of this origin read a reply. No cookies: there are none."""
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": _EXPOSED,
        "Vary": "Origin",
    }


def preflight_headers(origin: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The answer to a browser that asks before it sends the request itself."""
    asked = headers.get("Access-Control-Request-Headers", "")
    out = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": _METHODS,
        # Named one by one: `*` doesn't stand for Authorization.
        "Access-Control-Allow-Headers": asked if _HEADER_NAMES.fullmatch(asked) else "*",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin, Access-Control-Request-Headers",
    }
    if headers.get("Access-Control-Request-Private-Network") == "true":
        out["Access-Control-Allow-Private-Network"] = "true"
    return out
