"""The faults: each takes a place whose gateway is under load, breaks something, and mends it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from campaign_load import LONG, TOPICS
from campaign_place import HANG_TIMEOUT_S, Place

from served import Served

Chance = random.Random
Break = Callable[[Place, Chance], object]


@dataclass(frozen=True)
class Fault:
    """`needs_disk`: only with a file system of the place's own, which takes root."""

    kind: str
    break_it: Break
    needs_disk: bool = False


FAULTS: dict[str, Fault] = {}


def fault(*, needs_disk: bool = False) -> Callable[[Break], Break]:
    """Name a fault by its function."""

    def named(function: Break) -> Break:
        kind = function.__name__.replace("_", "-")
        FAULTS[kind] = Fault(kind, function, needs_disk)
        return function

    return named


@fault()
def kill_engine(place: Place, _: Chance) -> None:
    place.signal_engine(signal.SIGKILL)


@fault()
def kill_gateway(place: Place, _: Chance) -> None:
    place.kill()
    place.start()


@fault()
def kill_both(place: Place, _: Chance) -> None:
    pids = place.engine_pids()
    place.kill()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    place.start()


@fault()
def kill_engine_while_it_starts(place: Place, chance: Chance) -> None:
    place.signal_engine(signal.SIGKILL)
    time.sleep(chance.uniform(0.05, 1.0))
    place.signal_engine(signal.SIGKILL)


@fault()
def stop_engine_for_good(place: Place, _: Chance) -> None:
    place.signal_engine(signal.SIGSTOP)


@fault()
def stop_engine_for_a_moment(place: Place, chance: Chance) -> None:
    pids = place.engine_pids()
    place.signal_engine(signal.SIGSTOP)
    time.sleep(chance.uniform(0.05, HANG_TIMEOUT_S / 3))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@fault()
def stop_gateway_for_a_moment(place: Place, chance: Chance) -> None:
    os.kill(place.gateway.process.pid, signal.SIGSTOP)
    time.sleep(chance.uniform(0.1, 1.0))
    os.kill(place.gateway.process.pid, signal.SIGCONT)


@fault()
def terminate_and_start_again(place: Place, _: Chance) -> None:
    place.stop()
    place.start()


@fault()
def hang_ups(place: Place, chance: Chance) -> None:
    # In the queue and in restores (at once), in fills and prefills (long), in decoding (late).
    for number in range(6):
        text = f"{number} {chance.random()} " + LONG * chance.choice((0, 1, 3))
        system = [{"role": "system", "content": text}] if chance.random() < 0.5 else []
        user = {"role": "user", "content": f"{text} What of {chance.choice(TOPICS)}?"}
        body = {"model": "any", "messages": [*system, user], "max_tokens": 200}
        body["stream"] = chance.random() < 0.5
        connection = http.client.HTTPConnection("127.0.0.1", place.gateway.port, timeout=30)
        with contextlib.suppress(OSError, http.client.HTTPException):
            raw = json.dumps(body)
            connection.request(
                "POST", "/v1/chat/completions", raw, {"Content-Type": "application/json"}
            )
            time.sleep(chance.choice((0.0, 0.005, 0.02, 0.1, 0.4)))
        connection.close()


def _flip(path: Path, chance: Chance) -> None:
    with contextlib.suppress(OSError), path.open("r+b") as file:
        size = path.stat().st_size
        if size:
            at = chance.randrange(size)
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def _truncate(path: Path, chance: Chance) -> None:
    with contextlib.suppress(OSError):
        os.truncate(path, int(path.stat().st_size * chance.random()))


def _delete(path: Path, _: Chance) -> None:
    path.unlink(missing_ok=True)


def _some(files: list[Path], chance: Chance) -> list[Path]:
    return chance.sample(files, min(len(files), chance.randint(1, 4)))


@fault()
def flip_rows(place: Place, chance: Chance) -> None:
    for path in _some(place.files("*.rows"), chance):
        _flip(path, chance)


@fault()
def truncate_rows(place: Place, chance: Chance) -> None:
    for path in _some(place.files("*.rows"), chance):
        _truncate(path, chance)


@fault()
def delete_rows(place: Place, chance: Chance) -> None:
    for path in _some(place.files("*.rows"), chance):
        _delete(path, chance)


@fault()
def swap_rows(place: Place, chance: Chance) -> None:
    files = place.files("*.rows")
    if len(files) >= 2:
        one, other = chance.sample(files, 2)
        with contextlib.suppress(OSError):
            third = one.with_name("swapping")
            one.rename(third)
            other.rename(one)
            third.rename(other)


@fault()
def rows_damaged_then_engine_killed(place: Place, chance: Chance) -> None:
    for path in place.files("*.rows"):
        chance.choice((_flip, _truncate, _delete))(path, chance)
    place.signal_engine(signal.SIGKILL)


@fault()
def a_storm_over_the_rows(place: Place, chance: Chance) -> None:
    # While they are read and written, so that some change between two looks at them.
    until_s = time.monotonic() + chance.uniform(0.5, 2.0)
    while time.monotonic() < until_s:
        for path in _some([*place.files("*.rows"), *place.files("*.end")], chance):
            chance.choice((_flip, _truncate, _delete))(path, chance)
        time.sleep(chance.uniform(0.0, 0.05))


@fault()
def flip_staged(place: Place, chance: Chance) -> None:
    for path in _some(place.staged(), chance):
        _flip(path, chance)


@fault()
def truncate_staged(place: Place, chance: Chance) -> None:
    for path in _some(place.staged(), chance):
        _truncate(path, chance)


@fault()
def delete_staged(place: Place, chance: Chance) -> None:
    for path in _some(place.staged(), chance):
        _delete(path, chance)


@contextmanager
def _stopped(place: Place) -> Iterator[None]:
    place.stop()
    yield
    place.start()


@fault()
def flip_index(place: Place, chance: Chance) -> None:
    with _stopped(place):
        for path in place.files("*.sqlite*"):
            for _ in range(chance.randint(1, 30)):
                _flip(path, chance)


@fault()
def truncate_index(place: Place, chance: Chance) -> None:
    with _stopped(place):
        for path in place.files("*.sqlite*"):
            _truncate(path, chance)


@fault()
def delete_index(place: Place, chance: Chance) -> None:
    with _stopped(place):
        for path in place.files("*.sqlite*"):
            _delete(path, chance)


@fault()
def an_older_index(place: Place, chance: Chance) -> None:
    copies = {path: path.read_bytes() for path in place.files("*.sqlite")}
    time.sleep(chance.uniform(0.2, 0.5))
    with _stopped(place):
        for path, raw in copies.items():
            path.write_bytes(raw)
            for rest in ("-wal", "-shm"):
                path.with_name(path.name + rest).unlink(missing_ok=True)


@fault()
def a_damaged_export(place: Place, chance: Chance) -> None:
    with _stopped(place):
        listed = _command(place, "store", "ls", "--json")
        ids = _ids(json.loads(listed.stdout or "[]")) if listed.returncode == 0 else []
        file = place.root / "export.kw"
        if (
            ids
            and _command(place, "store", "export", chance.choice(ids), str(file)).returncode == 0
        ):
            chance.choice((_flip, _truncate))(file, chance)
            taken = _command(place, "store", "import", str(file))
            assert taken.returncode, f"a damaged export was taken: {taken.stdout}"
            assert "Traceback" not in taken.stderr, taken.stderr
        file.unlink(missing_ok=True)


def _ids(value: object) -> list[str]:
    """Whatever is called `id` in a command's JSON."""
    if isinstance(value, dict):
        own = [str(value["id"])] if "id" in value else []
        return own + [i for inner in value.values() for i in _ids(inner)]
    return [i for inner in value for i in _ids(inner)] if isinstance(value, list) else []


def _command(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = ["--config", str(place.root / "gateway" / "keepwarm.toml")]
    return Served.command(*arguments, *config, root=place.root)


@fault()
def staging_removed(place: Place, _: Chance) -> None:
    # A mount point can't be removed; what is in it can.
    for path in place.staging.iterdir():
        if path not in place.foreign and path.is_file():
            path.unlink(missing_ok=True)
    if not os.path.ismount(place.staging):
        for path in [p for p in place.foreign if place.staging in p.parents]:
            del place.foreign[path]
        shutil.rmtree(place.staging)


@fault()
def store_moved_away_for_a_while(place: Place, chance: Chance) -> None:
    homes = [p for p in place.store.iterdir() if p.is_dir() and p.name != "poetry"]
    homes = [p for p in homes if p.name != "lost+found"]
    for home in homes:
        home.rename(home.with_name(home.name + ".away"))
    time.sleep(chance.uniform(0.2, 1.0))
    for home in homes:
        away = home.with_name(home.name + ".away")
        if home.exists():
            shutil.rmtree(away)
            for path in [p for p in place.foreign if home in p.parents]:
                del place.foreign[path]
        else:
            away.rename(home)


@fault(needs_disk=True)
def disk_full(place: Place, chance: Chance) -> None:
    place.disk.fill()
    time.sleep(chance.uniform(0.3, 1.0))
    place.disk.free()


@fault(needs_disk=True)
def disk_full_at_a_start(place: Place, _: Chance) -> None:
    place.disk.fill()
    with _stopped(place):
        pass
    place.gateway.wait_ready()
    time.sleep(0.3)
    place.disk.free()


@fault(needs_disk=True)
def disk_read_only_at_a_start(place: Place, _: Chance) -> None:
    with _stopped(place):
        place.disk.read_only(on=True)
    try:
        place.gateway.wait_ready()
        time.sleep(0.3)
    finally:
        place.kill()
        place.disk.read_only(on=False)
        place.start()


@fault(needs_disk=True)
def disk_slow(place: Place, chance: Chance) -> None:
    place.disk.freeze(on=True)
    time.sleep(chance.uniform(0.3, 1.5))
    place.disk.freeze(on=False)


@fault(needs_disk=True)
def disk_gone_for_a_while(place: Place, chance: Chance) -> None:
    place.disk.away()
    time.sleep(chance.uniform(0.2, 1.0))
    if chance.random() < 0.3:
        place.signal_engine(signal.SIGKILL)
        time.sleep(0.3)
    place.disk.back()


@fault(needs_disk=True)
def staging_full(place: Place, chance: Chance) -> None:
    ballast = place.staging / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", 0) as file:
        while True:
            file.write(bytes(1 << 16))
    time.sleep(chance.uniform(0.3, 1.0))
    ballast.unlink()


@fault()
def clock_jumps(place: Place, chance: Chance) -> None:
    for _ in range(chance.randint(1, 3)):
        place.set_clock(chance.choice((-1, 1)) * chance.choice((90.0, 4e3, 9e4, 3e7, 3e8)))
        time.sleep(chance.uniform(0.1, 0.6))
        if chance.random() < 0.2:
            place.signal_engine(signal.SIGKILL)
    if chance.random() < 0.2:
        with _stopped(place):
            pass
    place.set_clock(0.0)


@fault()
def a_second_gateway_on_the_same_root(place: Place, chance: Chance) -> None:
    second = place.serve("second")
    try:
        with contextlib.suppress(BaseException):  # it may refuse to start, and say so
            second.wait_ready()
        if second.process.poll() is None:
            for topic in TOPICS:
                second.ask(f"And what of {topic}? {LONG}", model="minimal")
        elif "Traceback" in second.log.read_text():
            raise AssertionError(second.log.read_text()[-2000:])
        if chance.random() < 0.5 and second.process.poll() is None:
            second.stop()
    finally:
        second.process.kill()
        second.process.wait()
