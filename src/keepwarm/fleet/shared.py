"""An object store, or a directory that several machines mount, as bytes by name.

Theory of operation. Everything here may fail or hang, and then costs warmth only. A call that
fails or takes too long makes the store *away*: further calls are refused at once, without a
round trip, until a pause is over, which doubles with each failure up to a minute. Uploads and
downloads are paced each to a number of bytes a second, so that they never crowd out requests. A
transfer that is merely too large for the time limit is *slow*: it fails, and the store isn't away.

The library is obstore (S3, GCS, Azure, HTTP, a directory): credentials, endpoint and encryption at
rest are its and the store's affair, from the options given and the environment as usual there.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.slotfile.cells import as_view

T = TypeVar("T")

PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
SLOWEST_BYTES_PER_S = 1e6
"""A transfer may take as long as this many bytes a second need, beyond the time limit of a call."""
LARGE_BYTES = 1 << 20
"""From here on a transfer that takes too long is a slow one; a small call that does is a store that
is away."""


@dataclass(slots=True)
class SharedCounts:
    """What went over the wire since the start."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    failures: int = 0


class Pace:
    """Spreads bytes over time: `bytes_per_s` on average, bursts of a quarter of a second's worth.

    0 is no bound.
    """

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._free_s = float("-inf")

    def delay_s(self, size_bytes: int) -> float:
        """How long to wait before these bytes may go; they count as sent from now on."""
        if not self._rate:
            return 0.0
        now = self._clock()
        begin = max(self._free_s, now - 0.25)
        self._free_s = begin + size_bytes / self._rate
        return max(begin - now, 0.0)


class SharedStore:
    """See the module. Errors are SnapshotError with reason 'away', after which it is as before."""

    def __init__(
        self,
        objects: Any,
        *,
        upload_bytes_per_s: float = 0.0,
        download_bytes_per_s: float = 0.0,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take an obstore store; see `open_shared`."""
        self._library = importlib.import_module("obstore")
        self._missing: Any = importlib.import_module("obstore.exceptions").NotFoundError
        self._failure: Any = importlib.import_module("obstore.exceptions").BaseError
        self._objects = objects
        self._upload = Pace(upload_bytes_per_s, clock=clock)
        self._download = Pace(download_bytes_per_s, clock=clock)
        self._timeout_s = timeout_s
        self._clock = clock
        self._away_until_s = float("-inf")
        self._pause_s = PAUSE_S
        self.counts = SharedCounts()

    @property
    def is_away(self) -> bool:
        """Whether calls are refused just now."""
        return self._clock() < self._away_until_s

    async def get(
        self, name: str, *, timeout_s: float | None = None, size_bytes: int = 0
    ) -> bytes | memoryview | None:
        """An object's bytes, or None if there is none of this name.

        It is paced before it is asked for, by `size_bytes`: how large it is expected to be. A wait
        of our own making says nothing of the store, and isn't within the time limit.
        """
        await asyncio.sleep(self._download.delay_s(size_bytes))

        async def read() -> memoryview:
            found = await self._library.get_async(self._objects, name)
            return memoryview(await found.bytes_async())

        data = await self._try(read, timeout_s or self._timeout_s, size_bytes)
        if data is not None:
            self._download.delay_s(max(len(data) - size_bytes, 0))  # the next one waits for it
            self.counts.reads += 1
            self.counts.read_bytes += len(data)
        return data

    async def has(self, name: str) -> bool:
        """Whether there is an object of this name."""

        async def look() -> bool:
            await self._library.head_async(self._objects, name)
            return True

        return bool(await self._try(look, self._timeout_s, 0))

    async def put(self, name: str, buffers: Sequence[Buffer]) -> int:
        """Write an object, whole or not at all; returns its bytes. What was there is replaced."""
        data = b"".join(as_view(buffer) for buffer in buffers)
        await asyncio.sleep(self._upload.delay_s(len(data)))

        async def write() -> bool:
            await self._library.put_async(self._objects, name, data)
            return True

        await self._try(write, self._timeout_s, len(data))
        self.counts.writes += 1
        self.counts.written_bytes += len(data)
        return len(data)

    async def _try(
        self, work: Callable[[], Awaitable[T]], timeout_s: float, size_bytes: int
    ) -> T | None:
        """None if what is asked for isn't there. Raises: SnapshotError('away', 'slow')."""
        if self.is_away:
            raise SnapshotError("the shared store is away", reason="away")
        try:
            result = await asyncio.wait_for(work(), timeout_s + size_bytes / SLOWEST_BYTES_PER_S)
        except (self._missing, FileNotFoundError):
            self._pause_s = PAUSE_S
            return None
        except (self._failure, OSError, TimeoutError) as error:
            self.counts.failures += 1
            if isinstance(error, TimeoutError) and size_bytes >= LARGE_BYTES:
                raise SnapshotError(
                    f"{size_bytes:,} bytes take the shared store too long", reason="slow"
                ) from error
            self._away_until_s = self._clock() + self._pause_s
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
            # The library's messages name the URL and what the server said, over many lines.
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SnapshotError(f"the shared store is away: {said}", reason="away") from error
        self._pause_s = PAUSE_S
        return result


def open_shared(
    url: str,
    *,
    options: Mapping[str, str],
    upload_bytes_per_s: float,
    download_bytes_per_s: float,
    timeout_s: float,
    allow_http: bool = False,
) -> SharedStore:
    """A shared store by its URL (`s3://bucket/prefix`, `gs://`, `az://`) or directory.

    A directory is made, private to the user, if it isn't there.

    Raises: ConfigError if the library isn't installed, or doesn't take the URL or the options.
    """
    try:
        stores = importlib.import_module("obstore.store")
        failure = importlib.import_module("obstore.exceptions").BaseError
    except ImportError as error:
        raise ConfigError(
            "A shared store needs the fleet extra: pip install 'keepwarm[fleet]'."
        ) from error
    try:
        if "://" in url and not url.startswith("file://"):
            # Its own retries would hide an outage for minutes; a miss is cheaper.
            objects = stores.from_url(
                url,
                config=dict(options),
                client_options={"allow_http": allow_http},
                retry_config={"max_retries": 1},
            )
        else:
            directory = Path(url.removeprefix("file://")).expanduser()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            objects = stores.LocalStore(directory)
    except (failure, OSError, ValueError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"The shared store {url} can't be used: {said}.") from error
    return SharedStore(
        objects,
        upload_bytes_per_s=upload_bytes_per_s,
        download_bytes_per_s=download_bytes_per_s,
        timeout_s=timeout_s,
    )
