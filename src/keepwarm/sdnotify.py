"""Tell systemd how far we are: ready, status, watchdog, more time (the sd_notify protocol).

One datagram of `KEY=value` lines to the socket named in NOTIFY_SOCKET; see sd_notify(3). Written
here rather than taken from a package: docs/decisions/0030-sd-notify.md says why.
"""

from __future__ import annotations

import logging
import socket

log = logging.getLogger("keepwarm")

# systemctl shows one line; systemd refuses datagrams over a page.
_STATUS_BYTES = 1024


def message(
    *,
    ready: bool = False,
    stopping: bool = False,
    watchdog: bool = False,
    status: str | None = None,
    extend_s: float | None = None,
) -> bytes:
    """The datagram that says this.

    Args:
        ready: the service is up.
        stopping: it begins to shut down.
        watchdog: it is alive.
        status: one line for people; further lines are joined to it.
        extend_s: seconds from now within which the next message comes, at start-up and shutdown.
    """
    lines = []
    if ready:
        lines.append("READY=1")
    if stopping:
        lines.append("STOPPING=1")
    if watchdog:
        lines.append("WATCHDOG=1")
    if extend_s is not None:
        lines.append(f"EXTEND_TIMEOUT_USEC={int(extend_s * 1e6)}")
    if status is not None:
        # A line break would begin another key.
        text = " ".join(status.split()).encode()[:_STATUS_BYTES]
        lines.append("STATUS=" + text.decode("utf-8", "ignore"))
    return "\n".join(lines).encode()


class Notifier:
    """Sends to systemd, or does nothing where there is none."""

    def __init__(self, address: str | None) -> None:
        """Take the value of NOTIFY_SOCKET: a path, `@name` (abstract), or None."""
        self._address: str | None = None
        self._socket: socket.socket | None = None
        if address and address[0] in "/@":
            # A leading zero byte is how the kernel names abstract sockets.
            self._address = "\0" + address[1:] if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def __bool__(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def send(self, datagram: bytes) -> None:
        """Send without waiting. A message that can't be sent is dropped: it is no reason to fail.

        What must arrive is said again with the next one (see `service.presence`).
        """
        if self._socket is None or self._address is None or not datagram:
            return
        try:
            self._socket.sendto(datagram, self._address)
        except OSError as error:
            log.debug("systemd could not be told %r: %s", datagram, error)

    def close(self) -> None:
        """Close the socket; later messages do nothing."""
        if self._socket:
            self._socket.close()
            self._socket = None
