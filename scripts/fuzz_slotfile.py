"""Damage real slot files at random and see that the codec refuses them or makes sound ones.

    python scripts/fuzz_slotfile.py --seconds 600 [--seed N] [FILE...]

The files' names begin with the kind of memory, as in `tests/corpus/slotfile`, which is what is used
when none is given. A failure prints the seed and writes the damaged file to the working directory.
The address space is bounded, so that an allocation by a claimed size is a failure too.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile import (
    RowsPart,
    SlotFile,
    SlotFileError,
    assemble,
    boundary_end,
    file_tokens,
    parse,
    window_range,
)

CORPUS = Path(__file__).parents[1] / "tests" / "corpus" / "slotfile"
MAX_TOKENS = 4096
ADDRESS_SPACE_BYTES = 2 << 30
U32 = [0, 1, 2, 3, 4, 5, 127, 255, 256, 257, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
U64 = [0, 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
LONGEST_MOVE_BYTES = 512


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The file with one to four faults, mostly near its numbers."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(changed) < 16:
            break
        at = rng.randrange(len(changed) - 8)
        if rng.random() < 0.5:  # headers are at the beginning, the rest is mostly rows
            at = min(at, rng.randrange(16, 1024))
        fault = rng.randrange(8)
        if fault == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif fault in {1, 2}:
            struct.pack_into("<I", changed, at & ~3, rng.choice(U32))
        elif fault == 3:
            struct.pack_into("<Q", changed, at & ~3, rng.choice(U64))
        elif fault == 4:
            del changed[at:]
        elif fault == 5:
            del changed[at : at + rng.randint(1, LONGEST_MOVE_BYTES)]
        elif fault == 6:
            start = rng.randrange(len(changed))
            changed[at:at] = changed[start : start + rng.randint(1, LONGEST_MOVE_BYTES)]
        else:
            other = rng.choice(others)
            changed[at:] = other[rng.randrange(len(other)) :]
    return bytes(changed)


def check(data: bytes, kind: MemoryKind) -> str:
    """Raises AssertionError, or whatever the codec shouldn't; returns what became of the file."""
    with suppress(SlotFileError):
        file_tokens(data)
    try:
        found = parse(data, kind=kind, max_tokens=MAX_TOKENS)
    except SlotFileError as error:
        return error.reason
    count = len(found.tokens)
    assert 0 < count <= MAX_TOKENS
    assert sum(map(len, found.rows(0, count))) == found.layout.rows_bytes(count)
    for mend in (False, True):
        made = b"".join(written(found, mend=mend))
        again = parse(made, kind=kind, max_tokens=MAX_TOKENS)
        assert again.layout == found.layout
        assert again.tokens.tolist() == found.tokens.tolist()
        assert b"".join(again.rows(0, count)) == b"".join(found.rows(0, count))
        boundary = again.boundary()
        if boundary is not None:
            assert boundary_end(again.layout, boundary) == count
        if boundary is not None and kind is MemoryKind.SLIDING_WINDOW:
            assert window_range(again.layout, boundary)[0] >= 0
    return "accepted"


def written(found: SlotFile, *, mend: bool) -> list[memoryview | bytes]:
    """The file put together again, out of two parts where it has two tokens."""
    count = len(found.tokens)
    cuts = [0, count // 2, count] if count > 1 else [0, count]
    parts = [RowsPart(b"".join(found.rows(lo, count)), lo, count, hi) for lo, hi in pairwise(cuts)]
    return assemble(
        found.layout,
        tokens=found.tokens,
        parts=parts,
        boundary=found.boundary(),
        streams=found.streams,
        slot=found.slot,
        mend=mend,
    )


def main() -> int:
    """Run until the time is over or a fault is found (exit status 1)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    asked = parser.parse_args()
    paths = asked.files or sorted(CORPUS.glob("*.slot"))
    files = [(MemoryKind(path.name.split("-")[0]), path.read_bytes()) for path in paths]
    contents = [data for _, data in files]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    rng = random.Random(asked.seed)  # noqa: S311  repeatable, nothing secret
    print(f"seed {asked.seed}, {len(files)} files", flush=True)
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + asked.seconds
    while time.monotonic() < until:
        kind, data = rng.choice(files)
        if rng.random() < 0.1:
            kind = rng.choice(list(MemoryKind))
        changed = damaged(data, contents, rng)
        try:
            outcomes[check(changed, kind)] += 1
        except Exception as error:  # noqa: BLE001  any exception but SlotFileError is a finding
            path = Path(f"{kind.value}-fuzz-{asked.seed}-{outcomes.total()}.slot")
            path.write_bytes(changed)
            print(f"{error!r} on file {outcomes.total()}, kept as {path}", file=sys.stderr)
            return 1
    print(f"{outcomes.total()} files: " + ", ".join(f"{n} {r}" for r, n in outcomes.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
