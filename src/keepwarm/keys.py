"""API keys: who a request is from, and so which namespace it sees."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from keepwarm.errors import ConfigError, UnauthorizedError


class Keyring:
    """Known API keys. Without any, everyone is one and the same."""

    def __init__(self, keys: Iterable[tuple[str, str]], operators: Sequence[str] = ()) -> None:
        """Take pairs of name and key; several keys of one name are one tenant's.

        Digests are compared, so that lengths don't show in timing either.

        Args:
            keys: the pairs.
            operators: names that may see figures of all.
        """
        self._digests = [(name, _digest(key)) for name, key in keys]
        self._names = {name for name, _ in self._digests}
        self._operators = frozenset(operators)

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    @property
    def tenants(self) -> int:
        """How many share this Keepwarm."""
        return max(len(self._names), 1)

    def sees_all(self, namespace: str) -> bool:
        """Whether a namespace may see sizes that others' requests have a part in."""
        return len(self._names) <= 1 or namespace in self._operators

    def namespace(self, headers: Mapping[str, str]) -> str:
        """The namespace of a request: that of its key (`Authorization: Bearer` or `x-api-key`).

        Raises:
            UnauthorizedError: keys are set and this one isn't among them.
        """
        if not self._digests:
            return "local"
        scheme, _, bearer = headers.get("Authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
        digest = _digest(given.strip())
        found = ""
        for name, known in self._digests:
            # All are compared, in constant time each: timing tells nothing of which one it is.
            if hmac.compare_digest(digest, known):
                found = name
        if not found:
            raise UnauthorizedError(
                "This Keepwarm asks for an API key. Send it as `Authorization: Bearer KEY`."
            )
        return found


def load_keys(keys: Sequence[str], file: str, operators: Sequence[str] = ()) -> Keyring:
    """Keys from the settings and from a file of `name:key` or `key` lines.

    A key without a name is named by its digest, so that its namespace outlives its place in the
    file.

    Raises:
        ConfigError: the file can't be read, a line holds no key, or an operator has none.
    """
    lines = list(keys)
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"The API key file {file} can't be read: {error.strerror}."
            ) from error
        lines += [line.strip() for line in text.splitlines() if line.strip()[:1] not in ("", "#")]
    named: list[tuple[str, str]] = []
    for line in lines:
        name, colon, key = line.rpartition(":")
        key = key.strip()
        if not key or (colon and not name.strip()):
            raise ConfigError("An API key is empty: give `name:key` or `key`.")
        named.append((name.strip() or _digest(key).hex()[:12], key))
    if unknown := set(operators) - {name for name, _ in named}:
        raise ConfigError(
            f"server.operators names {', '.join(sorted(unknown))}, but there is no API key of that "
            "name."
        )
    return Keyring(named, operators)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. A name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: str) -> bytes:
    # Header bytes that aren't UTF-8 arrive as surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
