"""What is ours under a store's root, and the one way in which a whole store is removed.

A root may be a directory that holds other things. A store in it is a directory whose name is 32
hexadecimal digits, and which holds a tag that says the same name; beside it lie an index and a lock
of that name. Inside, a file is ours if its name has the form of one (see `files`). Whatever isn't
proved so is neither removed, nor moved, nor counted.

What can't be used is set aside: directory and index get names that end in `.<number>.aside`, and
stay until room is needed or somebody prunes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from keepwarm.store.disk import Disk

INDEX_SUFFIX = ".index"
LOCK_SUFFIX = ".lock"
QUARANTINE = "quarantine"
UNSAVED = "unsaved-"  # how directories of stores for one life begin
TAG = "CACHEDIR.TAG"
"""Also tells backup programs to leave the directory out (bford.info/cachedir)."""

_STORE = re.compile(r"([0-9a-f]{32})(?:\.[0-9]{1,6}\.aside)?")
_FILE = re.compile(r"[0-9a-f]{10,16}(?:\.rows|-[0-9a-f]{8,16}\.end)(?:\.new)?")


class OwnFile(NamedTuple):
    """A file of ours, as listed."""

    path: Path
    size_bytes: int


def store_name(fingerprint: str, layout: str, *, schema: int) -> str:
    """The name of a store's directory, index and lock, without suffix.

    Layout and schema belong to it, so that two of them never meet.
    """
    return xxhash.xxh3_128_hexdigest(f"{schema}\0{layout}\0{fingerprint}".encode())


def is_own_name(name: str) -> bool:
    """Whether this could be the name of a file in a store's directory."""
    return _FILE.fullmatch(name) is not None


def _tag_of(name: str) -> bytes:
    return (
        "Signature: 8a477f597d28d172789f06886806bc55\n"
        f"# keepwarm snapshot store {name}\n"
        "# Keepwarm removes files of its own in here when it needs room.\n"
    ).encode()


def put_tag(directory: Path) -> None:
    """Mark a store's directory as ours, if it isn't yet. Raises: OSError."""
    path = directory / TAG
    if not path.exists():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_tag_of(directory.name))


def is_store(directory: Path) -> bool:
    """Whether name and tag prove that this directory, or what it was set aside from, is ours."""
    form = _STORE.fullmatch(directory.name)
    if form is None or directory.is_symlink():
        return False
    tag = _tag_of(form[1])
    try:
        with (directory / TAG).open("rb") as file:
            return file.read(len(tag) + 1) == tag
    except OSError:
        return False


def stores_in(root: Path) -> list[Path]:
    """The directories of all stores in a root, those set aside included. Raises: OSError."""
    with os.scandir(root) as entries:
        found = [Path(entry.path) for entry in entries if _STORE.fullmatch(entry.name)]
    return [directory for directory in sorted(found) if is_store(directory)]


def own_files(directory: Path) -> Iterator[OwnFile]:
    """The files of ours in a store's directory and its quarantine. Raises: OSError."""
    for place in (directory, directory / QUARANTINE):
        with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                if is_own_name(entry.name) and entry.is_file(follow_symlinks=False):
                    yield OwnFile(Path(entry.path), entry.stat(follow_symlinks=False).st_size)


def remove_store(directory: Path, *, disk: Disk) -> int:
    """Remove a store's files, its index, and its directory if nothing else is in it; returns the
    bytes freed. The caller holds its lock. The tag goes last, so a removal that was cut can be
    finished.

    Raises: OSError; ValueError for a directory that isn't a store.
    """
    if not is_store(directory):
        raise ValueError(f"{directory} isn't a store of ours")
    freed = 0
    for path, size in list(own_files(directory)):
        disk.unlink(path)
        freed += size
    for path in index_files(directory):
        disk.unlink(path)
    with contextlib.suppress(OSError):
        (directory / QUARANTINE).rmdir()
    others = {entry.name for entry in directory.iterdir()} - {TAG}
    if not others:
        disk.unlink(directory / TAG)
        directory.rmdir()
    return freed


def index_files(directory: Path) -> list[Path]:
    """The index that belongs to a store's directory, and what SQLite keeps beside it."""
    name = directory.name
    if name.endswith(".aside"):
        bare, _, rest = name.partition(".")
        index = directory.with_name(f"{bare}{INDEX_SUFFIX}.{rest}")
    else:
        index = directory.with_name(name + INDEX_SUFFIX)
    return [index.with_name(index.name + suffix) for suffix in ("", "-wal", "-shm")]


def set_aside(directory: Path, *, disk: Disk) -> str:
    """Move a store's directory and index to a name of their own; returns it. The lock stays.

    Raises: OSError.
    """
    number = 1
    while True:
        aside = directory.with_name(f"{directory.name}.{number}.aside")
        targets = index_files(aside)
        if not aside.exists() and not any(path.exists() for path in targets):
            break
        number += 1
    # The index first: if the directory can't follow, its files are strays of a new index, and stay.
    for source, target in zip(index_files(directory), targets, strict=True):
        with contextlib.suppress(FileNotFoundError):
            disk.rename(source, target)
    with contextlib.suppress(FileNotFoundError):
        disk.rename(directory, aside)
    return aside.name
