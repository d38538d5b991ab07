"""Break something, look, and again: a seeded campaign of faults on a real gateway and engine.

    python tests/faults/campaign.py --count 100 --seed 7
    python tests/faults/campaign.py --only flip-rows,kill-engine --count 20

Each round begins with clients asking; something breaks at a moment that the seed chooses, and is
mended. Then every answer must be that of an undisturbed run, no request lost but those in flight at
a gateway that was killed itself (they are sent again and answered), the gateway healthy within 30
seconds, memory, descriptors and processes as they were, and no file of somebody else's gone.

Writes a table; exit status 1 if anything of that failed. A seed replays a campaign, up to when
threads come to run.
"""

from __future__ import annotations

import argparse
import http.client
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from campaign_faults import FAULTS, Fault
from campaign_load import Load, Question, Tally, ask, questions, until_healthy
from campaign_place import HEALTHY_WITHIN_S, Place

from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2, write_tiny_qwen3

MODELS = {"plain": write_tiny_qwen3, "window": write_tiny_gemma3, "hybrid": write_tiny_lfm2}
REQUESTS = 9
CHECKS = 3


@dataclass
class Kind:
    """What came of the faults of one kind."""

    faults: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    healthy_s: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


class Watch(threading.Thread):
    """Looks at the gateway's health all the time; `unhealthy_s`: when it last wasn't."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self._place = place
        self._ended = threading.Event()
        self.unhealthy_s = 0.0

    def run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._place.gateway.port)
                connection.timeout = 2
                connection.request("GET", "/health")
                is_well = connection.getresponse().status == 200
                connection.close()
            except (OSError, http.client.HTTPException):
                is_well = False
            if not is_well:
                self.unhealthy_s = time.monotonic()

    def end(self) -> None:
        self._ended.set()
        self.join()


class Campaign:
    """See the module."""

    def __init__(self, root: Path, model: Path, *, seed: int) -> None:
        self.seed = seed
        self.kinds: dict[str, Kind] = {}
        calm = Place(root / "calm", model)
        try:
            calm.start()
            calm.gateway.wait_ready()
            self._known: list[Question] = questions(calm.gateway)
            calm.stop()
        finally:
            calm.close()
        # Blocks as disks have them, and as small ones do: SQLite's shared memory differs on them.
        self.place = Place(root / "place", model, block_bytes=(4096, 1024)[seed % 2])

    def run(self, faults: list[Fault]) -> None:
        """All of them, one after another, in one place."""
        self.place.start()
        self.place.gateway.wait_ready()
        for number, one in enumerate(faults):
            chance = random.Random(f"{self.seed}/{number}")
            kind = self.kinds.setdefault(one.kind, Kind())
            told = len(kind.troubles)
            is_well = self._round(one, kind, chance, f"{one.kind} #{number}")
            for text in kind.troubles[told:]:  # a campaign takes hours: whatever it finds is told
                sys.stderr.write(f"{text}\n")
            if not is_well:
                self.place.close()
                kind.troubles.append(f"{one.kind} #{number}: begun anew")
                before = self.place
                root = before.root.with_name(f"place-{number}")
                self.place = Place(root, before.model, block_bytes=before.block_bytes)
                self.place.start()
                self.place.gateway.wait_ready()

    def _round(self, one: Fault, kind: Kind, chance: random.Random, name: str) -> bool:
        """One fault; False if nothing can follow it."""
        place = self.place
        place.is_killed = False
        place.plant()
        load = Load(place, [chance.choice(self._known) for _ in range(REQUESTS)], chance)
        watch = Watch(place)
        load.start()
        watch.start()
        time.sleep(chance.uniform(0.0, 0.4))
        began_s = time.monotonic()
        kind.faults += 1
        try:
            one.break_it(place, chance)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - told with the seed
            kind.troubles.append(f"{name}: {type(error).__name__}: ...{str(error)[-1500:]}")
            place.mend()
        load.join()
        watch.end()
        is_well = until_healthy(place, time.monotonic()) is not None
        kind.healthy_s.append(max(watch.unhealthy_s - began_s, 0.0) if is_well else 999.0)
        if is_well:
            self._check(load.tally, chance)
        else:
            kind.troubles.append(
                f"{name}: not healthy within {HEALTHY_WITHIN_S:.0f} s, its exit status is "
                f"{place.gateway.process.poll()}: " + place.gateway.log.read_text()[-1500:]
            )
        kind.counts.update(load.tally.counts)
        found = place.missing()
        if place.gateway.process.poll() is None:
            found += place.grown()
        kind.troubles += [f"{name}: {note}" for note in (*load.tally.notes, *found)]
        kind.troubles += [f"{name}: {text}" for text in _tracebacks(place.gateway.log)]
        return is_well

    def _check(self, tally: Tally, chance: random.Random) -> None:
        """What is asked after a fault, one by one."""
        for question in chance.sample(self._known, CHECKS):
            try:
                verdict = question.verdict(ask(self.place.gateway, question, stream=False))
                tally.add(
                    verdict, str(question.body["messages"])[-200:] if verdict == "wrong" else ""
                )
            except Exception as error:  # noqa: BLE001 - any of them is a lost request
                tally.add("lost", f"afterwards: {error!r}")

    def table(self) -> str:
        """Faults by kind."""
        head = ["fault", "faults", "requests", "tie", "cut", "lost", "wrong", "p50 s", "p95 s"]
        rows = [head]
        total = Kind()
        for name, kind in sorted(self.kinds.items()):
            total.faults += kind.faults
            total.counts.update(kind.counts)
            total.healthy_s += kind.healthy_s
            rows.append(_row(name, kind))
        rows.append(_row("all", total))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines)

    @property
    def troubles(self) -> list[str]:
        """Whatever wasn't as it should be."""
        return [text for kind in self.kinds.values() for text in kind.troubles]


def _tracebacks(log: Path) -> list[str]:
    """What a log says that nobody foresaw; each is told once."""
    text = log.read_text(errors="replace")
    log.write_text("")
    return [f"Traceback{part}"[:2500] for part in text.split("Traceback")[1:]]


def _row(name: str, kind: Kind) -> list[str]:
    counts = kind.counts
    asked = sum(counts[what] for what in ("right", "tie", "wrong", "lost"))
    healthy = sorted(kind.healthy_s) or [0.0]
    p95 = healthy[min(int(len(healthy) * 0.95), len(healthy) - 1)]
    return [
        name,
        *(str(n) for n in (kind.faults, asked)),
        *(str(counts[what]) for what in ("tie", "cut", "lost", "wrong")),
        f"{statistics.median(healthy):.2f}",
        f"{p95:.2f}",
    ]


def chosen(
    count: int, *, seed: int, only: str = "", has_disk: bool
) -> tuple[list[Fault], list[str]]:
    """Faults in the seed's order, every kind about equally often; and what is skipped."""
    names = only.split(",") if only else list(FAULTS)
    able = [FAULTS[name] for name in names if has_disk or not FAULTS[name].needs_disk]
    skipped = [name for name in names if FAULTS[name] not in able]
    chance = random.Random(seed)
    out: list[Fault] = []
    while len(out) < count:
        out += chance.sample(able, len(able))
    return out[:count], skipped


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="", help="kinds, separated by commas")
    parser.add_argument("--memory", choices=MODELS, default="plain", help="the model's kind")
    parser.add_argument("--list", action="store_true", help="name the kinds")
    options = parser.parse_args()
    # So that file systems are given back and processes ended, whatever ends this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.list:
        sys.stdout.write("\n".join(FAULTS) + "\n")
        return 0
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    with tempfile.TemporaryDirectory(prefix="keepwarm-faults-") as folder:
        root = Path(folder)
        model = root / "tiny.gguf"
        MODELS[options.memory](model, small_model())
        began_s = time.monotonic()
        campaign = Campaign(root, model, seed=seed)
        try:
            faults, skipped = chosen(
                options.count, seed=seed, only=options.only, has_disk=campaign.place.disk.is_real
            )
            campaign.run(faults)
        finally:
            campaign.place.close()
        took_s = time.monotonic() - began_s
        said = [campaign.table(), f"seed {seed}, {options.count} faults in {took_s:.0f} s"]
        if skipped:
            said.append(f"skipped, since own file systems take root: {', '.join(skipped)}")
        sys.stdout.write("\n".join([*said, *(f"\n{text}" for text in campaign.troubles)]) + "\n")
        wrong = sum(k.counts["wrong"] + k.counts["lost"] for k in campaign.kinds.values())
        return 1 if wrong or campaign.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
