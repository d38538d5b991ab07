"""Keepwarm beside the bare engine: the same series of requests to both, tokens compared.

    PYTHONPATH=tests:tests/live python tests/live/differential.py --seed 7 --count 20
    ... --models H --series "append:0:1,side:0:0,append:0:2" --template thinking --verbose

Theory of operation. A series (see `series`) is sent to the engine alone with its defaults (four
slots over one pool, its cache in memory) and then, with the very same bodies, to Keepwarm. Three
sums are compared, of prompt tokens that were evaluated:

1. Keepwarm's, fills ahead of a request included (`X-Keepwarm-Filled`);
2. the bare engine's;
3. the least possible: what lies beyond the longest common token prefix with anything that was asked
   or answered before. A model that can't be cut goes on from a message's start or a prompt's end.

The law: 1 is at most 2, on plain attention also within 2 % of 3, each with a slack of one batch a
series (what a client that hangs up leaves under way is one, too). A killed engine has lost all, so
a series with a kill is also compared with 1.25 times the least. No promise is broken, and the
answers are the bare engine's, or part from it at a near tie: two splits of one prompt into batches
differ in their last bits.

Both servers live on from series to series, as they do on people's machines; what fails is tried
again on new ones, and made as short as it can be. Writes a table; exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import xllamacpp
from hypothesis import HealthCheck, Phase, given, seed, settings

from bareengine import BARE, BareEngine, end_engine, start_engine
from series import (
    LONG_TOKENS,
    REPLY_TOKENS,
    TEMPLATES,
    Ask,
    Body,
    Kill,
    Pause,
    Step,
    Talks,
    series,
    steps_of,
    write_template,
)
from served import Served
from smalltiers import write_small_tiers
from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2, write_tiny_qwen3

KINDS = {"P": write_tiny_qwen3, "H": write_tiny_lfm2, "W": write_tiny_gemma3}
CONTEXT_TOKENS = 32768
SLOTS = 2
SLACK_TOKENS = 512  # llama-server's default micro-batch
WITHIN = 1.02
WITHIN_AFTER_KILL = 1.25
PAUSE_S = 1.0
SETTLE_S = 1.5
HANG_UP_AT = 0.05
# Two splits of one prompt differ by some tenths in a logprob.
NEAR_TIE = 1.0

TopLogprobs = list[dict[str, float]]


@dataclass(frozen=True)
class Reply:
    """What one request evaluated and said; `ids` are the tokens of the reply."""

    evaluated: int
    told: str = ""
    said: str = ""
    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    top: TopLogprobs = field(default_factory=list)


class Server(Protocol):
    """What a series is sent to."""

    base: str

    def post(self, path: str, body: Body) -> Any: ...
    def kill(self) -> None: ...
    def end(self) -> None: ...


class Bare:
    """The engine alone."""

    def __init__(self, root: Path, model: Path, template: Path) -> None:
        defaults = {
            name: getattr(xllamacpp.CommonParams(), name) for name in BARE if "." not in name
        }
        self._params = {
            name: value for name, value in defaults.items() if isinstance(value, int | float)
        } | {
            "n_ctx": CONTEXT_TOKENS,
            "n_parallel": -1,
            "fit_params": False,
            "cpuparams.n_threads": 1,
            "cpuparams_batch.n_threads": 1,
            "chat_template": template.read_text(),
        }
        self._root, self._model = root, model
        root.mkdir(parents=True, exist_ok=True)
        self._engine = self._start()

    def _start(self) -> BareEngine:
        return start_engine(self._model, self._root, self._params)

    @property
    def base(self) -> str:
        return self._engine.base

    def post(self, path: str, body: Body) -> tuple[Any, dict[str, str]]:
        return self._engine.post(path, body), {}

    def tokens(self, body: Body) -> list[int]:
        prompt = self._engine.post("/apply-template", body)["prompt"]
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        found: list[int] = self._engine.post("/tokenize", asked)["tokens"]
        return found

    def opening(self) -> int:
        asked = {"content": "<|im_start|>", "parse_special": True}
        return int(self._engine.post("/tokenize", asked)["tokens"][0])

    def kill(self) -> None:
        self._engine.process.kill()
        self._engine.process.wait()
        self._engine = self._start()

    def end(self) -> None:
        end_engine(self._engine)


class Keepwarm:
    """`keepwarm serve`, with an engine of its own."""

    def __init__(self, root: Path, model: Path, template: Path, tiers: Path) -> None:
        self._root = root
        self._sections = {
            "engine": {
                "model": str(model),
                "chat_template": str(template),
                "slots": SLOTS,
                "context": CONTEXT_TOKENS,
                "threads": 1,
            },
            "tiers": {"dir": str(tiers), "warm": ["minimal"]},
        }
        self._misses: Counter[str] = Counter()
        self._served = self._start()

    def _start(self) -> Served:
        served = Served(self._root, **{k: dict(v) for k, v in self._sections.items()})
        return served.wait_ready()

    @property
    def base(self) -> str:
        return self._served.base

    @property
    def log(self) -> str:
        return self._served.log.read_text()

    def post(self, path: str, body: Body) -> tuple[Any, dict[str, str]]:
        answer = self._served.post(path, body)
        assert answer.status == 200, f"{answer.status}: {answer.body}"
        return answer.body, answer.headers

    def misses(self) -> Counter[str]:
        """Broken promises and other misses by reason, those of former lives included."""
        return self._misses + self._misses_now()

    def _misses_now(self) -> Counter[str]:
        out: Counter[str] = Counter()
        for line in self._served.read("/metrics").splitlines():
            if line.startswith("keepwarm_misses_total{"):
                out[line.split('"')[1]] += int(float(line.rsplit(" ", 1)[1]))
        return out

    def kill(self) -> None:
        self._misses += self._misses_now()
        self._served.kill()
        self._served = self._start()

    def end(self) -> None:
        self._served.process.terminate()
        try:
            self._served.process.wait(30)
        finally:
            self._served.kill()


@dataclass
class Least:
    """The least that must be evaluated by who remembers all that was asked and answered."""

    bare: Bare
    cuttable: bool
    known: list[list[int]] = field(default_factory=list)
    _opening: int = -1

    def of(self, body: Body) -> int:
        tokens = self.bare.tokens(body)
        common = max((_common(tokens, other) for other in self.known), default=0)
        common = min(common, len(tokens) - 1)
        if not self.cuttable:
            common = self._state(tokens, common)
        self.known.append(tokens)
        return len(tokens) - common

    def said(self, ids: Sequence[int]) -> None:
        """The last prompt was answered; its last token isn't computed."""
        self.known[-1] = [*self.known[-1], *ids[:-1]]

    def _state(self, tokens: list[int], common: int) -> int:
        if self._opening < 0:
            self._opening = self.bare.opening()
        begun = (len(o) for o in self.known if len(o) <= common)
        ends = {size for size in begun if any(o == tokens[:size] for o in self.known)}
        ends |= {i for i in range(common + 1) if tokens[i] == self._opening}
        return max(ends, default=0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class Sent:
    """One request of a series, and what came of it."""

    event: Ask
    reply: Reply
    least: int = 0


def follow(steps: list[Step], words: object, server: Server, least: Least | None) -> list[Sent]:
    """Send a series; with `least`, say what each request must cost and reply as the model did."""
    out: list[Sent] = []
    events = Talks(words).events(steps)
    said: str | None = None
    with contextlib.suppress(StopIteration):
        while True:
            event = events.send(said)
            said = None
            if isinstance(event, Pause):
                time.sleep(PAUSE_S)
            elif isinstance(event, Kill):
                time.sleep(SETTLE_S)
                server.kill()
            else:
                out.append(sent := _send(event, server, least))
                said = sent.reply.said
    return out


def again(before: list[Sent], steps: list[Step], words: object, server: Server) -> list[Sent]:
    """Send the very same bodies to another server."""
    out: list[Sent] = []
    asked = iter(before)
    events = Talks(words).events(steps)
    said: str | None = None
    with contextlib.suppress(StopIteration):
        while True:
            event = events.send(said)
            said = None
            if isinstance(event, Pause):
                time.sleep(PAUSE_S)
            elif isinstance(event, Kill):
                time.sleep(SETTLE_S)
                server.kill()
            else:
                known = next(asked)
                out.append(_send(known.event, server, None))
                said = known.reply.said
    return out


def _send(event: Ask, server: Server, least: Least | None) -> Sent:
    if event.hangs_up:
        return Sent(event, Reply(_hang_up(event.body, server), "gone"))
    must = least.of(event.body) if least else 0
    more = {"max_tokens": REPLY_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    body, headers = server.post("/v1/chat/completions", event.body | more)
    choice = body["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    reply = Reply(
        int(body["timings"]["prompt_n"]) + int(headers.get("x-keepwarm-filled", 0)),
        headers.get("x-keepwarm-plan", ""),
        choice["message"].get("content") or "",
        tuple(token["id"] for token in tokens),
        tuple(token["token"] for token in tokens),
        [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in tokens],
    )
    if least:
        least.said(reply.ids)
    return Sent(event, reply, must)


def _hang_up(body: Body, server: Server) -> int:
    """Leave when a share of the prompt is evaluated; how many tokens of it were, in the end."""
    place = urlsplit(server.base)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    raw = json.dumps(body | {"stream": True, "max_tokens": REPLY_TOKENS})
    connection.request("POST", "/v1/chat/completions", raw, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 30
    seen: dict[str, Any] = {}
    while time.monotonic() < deadline:
        busy = [slot for slot in _slots(server) if slot["is_processing"]]
        if seen and not busy:
            break
        seen = busy[0] if busy else seen
        if seen.get("n_prompt_tokens_processed", 0) >= HANG_UP_AT * LONG_TOKENS:
            break
    connection.close()
    while True:
        now = next(slot for slot in _slots(server) if slot["id"] == seen["id"])
        if not now["is_processing"]:
            # What it holds by now, without what it went on from.
            return int(now["n_prompt_tokens"]) - int(seen["n_prompt_tokens_cache"])
        assert time.monotonic() < deadline, "the engine computes on for nobody"


def _slots(server: Server) -> list[dict[str, Any]]:
    """The engine's slots."""
    place = urlsplit(server.base)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/slots")
        found: list[dict[str, Any]] = json.load(connection.getresponse())
        return found


@dataclass
class Verdict:
    """What came of one series on both."""

    kind: str
    template: str
    words: str
    steps: list[Step]
    bare: list[Sent]
    ours: list[Sent]
    misses: Counter[str]
    troubles: list[str] = field(default_factory=list)

    @property
    def sums(self) -> tuple[int, int, int]:
        """Tokens evaluated by Keepwarm, by the bare engine, and the least possible."""
        return (
            sum(sent.reply.evaluated for sent in self.ours),
            sum(sent.reply.evaluated for sent in self.bare),
            sum(sent.least for sent in self.bare),
        )

    @property
    def written(self) -> str:
        return ",".join(map(str, self.steps))

    def judge(self) -> None:
        """Say what of the law is broken."""
        ours, bare, least = self.sums
        slack = SLACK_TOKENS * (1 + sum(sent.event.hangs_up for sent in self.bare))
        if ours > bare + slack:
            self.troubles.append(f"more than the bare engine: {ours} > {bare}")
        is_killed = any(step.act == "kill" for step in self.steps)
        within = WITHIN_AFTER_KILL if is_killed else WITHIN
        if (self.kind == "P" or is_killed) and ours > within * least + slack:
            self.troubles.append(f"more than {within} times the least: {ours}, {least}")
        if self.misses:
            self.troubles.append(f"broken promises: {dict(self.misses)}")
        for number, (a, b) in enumerate(zip(self.bare, self.ours, strict=True)):
            if trouble := _other_answer(a.reply, b.reply):
                self.troubles.append(f"request {number} was answered otherwise: {trouble}")

    def requests(self) -> Iterator[str]:
        """A line for each request."""
        for number, (a, b) in enumerate(zip(self.bare, self.ours, strict=True)):
            mine, theirs = b.reply, a.reply
            mark = " <<<" if mine.evaluated > max(theirs.evaluated, a.least) + 64 else ""
            yield (
                f"    {number:>3}  keepwarm {mine.evaluated:>6} {mine.told:<9}"
                f" bare {theirs.evaluated:>6}  least {a.least:>6}{mark}"
            )


def _other_answer(one: Reply, other: Reply) -> str:
    """Where two answers at temperature 0 part though nothing was near; '' if they don't."""
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a == b:
            continue
        first, second = one.top[place], other.top[place]
        gap = max(
            first[a] - first.get(b, min(first.values())),
            second[b] - second.get(a, min(second.values())),
        )
        return f"token {place}, {gap:.2f} apart" if gap > NEAR_TIE else ""
    return ""


@dataclass
class Pair:
    """Both servers with one model and template."""

    kind: str
    template: str
    root: Path
    model: Path
    tiers: Path
    bare: Bare = field(init=False)
    keepwarm: Keepwarm = field(init=False)

    def __enter__(self) -> Pair:
        self.root.mkdir(parents=True)
        path = write_template(self.template, self.root)
        self.bare = Bare(self.root / "bare", self.model, path)
        try:
            self.keepwarm = Keepwarm(self.root / "keepwarm", self.model, path, self.tiers)
        except BaseException:
            self.bare.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.bare.end()
        self.keepwarm.end()

    def run(self, steps: list[Step], words: str) -> Verdict:
        """Send one series to both, and judge."""
        before = self.keepwarm.misses()
        bare = follow(steps, words, self.bare, Least(self.bare, self.kind == "P"))
        ours = again(bare, steps, words, self.keepwarm)
        time.sleep(0.2)  # a broken promise is looked into behind the reply
        misses = self.keepwarm.misses() - before
        verdict = Verdict(self.kind, self.template, words, steps, bare, ours, misses)
        verdict.judge()
        return verdict


@dataclass
class Place:
    """Where models, tiers and servers' folders lie."""

    root: Path
    _made: int = 0

    def model(self, kind: str) -> Path:
        path = self.root / f"{kind}.gguf"
        if not path.is_file():
            KINDS[kind](path, small_model(), context_tokens=CONTEXT_TOKENS)
        return path

    def pair(self, kind: str, template: str) -> Pair:
        tiers = self.root / "tiers"
        if not tiers.is_dir():
            write_small_tiers(tiers)
        self._made += 1
        root = self.root / f"{kind}-{template}-{self._made}"
        return Pair(kind, template, root, self.model(kind), tiers)


def drawn(count: int, number: int) -> list[list[Step]]:
    """So many series, the same ones for the same number."""
    out: list[list[Step]] = []

    @seed(number)
    @settings(
        max_examples=count + 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(series())
    def collect(steps: list[Step]) -> None:
        out.append(steps)

    collect()
    return out[1:]  # the first is the simplest that there is


def compared(place: Place, kind: str, template: str, count: int, number: int) -> Iterator[Verdict]:
    """Random series on one pair of servers."""
    with place.pair(kind, template) as pair:
        for place_, steps in enumerate(drawn(count, number)):
            yield pair.run(steps, f"{number}.{place_}")


def shortened(place: Place, failed: Verdict, *, tries: int = 40) -> Verdict | None:
    """The shortest series found that fails on new servers; None if it doesn't there."""

    def fails(steps: list[Step]) -> Verdict | None:
        with place.pair(failed.kind, failed.template) as pair:
            verdict = pair.run(steps, failed.words)
        return verdict if verdict.troubles else None

    best = fails(failed.steps)
    at = len(failed.steps) - 1
    while best and at >= 0 and tries > 0:
        tries -= 1
        shorter = [*best.steps[:at], *best.steps[at + 1 :]]
        best = fails(shorter) or best
        at = min(at, len(best.steps)) - 1
    return best


def row(verdict: Verdict) -> str:
    """A line of the table."""
    ours, bare, least = verdict.sums
    return (
        f"{verdict.words:<12} {verdict.kind} {verdict.template:<9} {len(verdict.ours):>3} requests"
        f"  keepwarm {ours:>6}  bare {bare:>6}  least {least:>6}"
        f"  misses {sum(verdict.misses.values())}  {'; '.join(verdict.troubles) or 'ok'}"
    )


def tell(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--count", type=int, default=10, help="series of each kind of model")
    parser.add_argument("--models", default="PHW")
    parser.add_argument("--template", default="", help="only this one")
    parser.add_argument("--series", default="", help="this one, as the table writes it")
    parser.add_argument("--words", default="", help="what the words of --series come from")
    parser.add_argument(
        "--no-shorten", action="store_true", help="leave failing series as they are"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="each request")
    options = parser.parse_args()
    number = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    templates = [options.template] if options.template else list(TEMPLATES)
    tell(f"seed {number}, {options.count} series on each of {options.models}")
    failed: list[Verdict] = []
    totals: dict[str, tuple[int, ...]] = {}
    with tempfile.TemporaryDirectory(prefix="keepwarm-series-") as folder:
        place = Place(Path(folder))
        for kind in options.models:
            verdicts: Iterator[Verdict]
            for at, template in enumerate(templates):
                if options.series:
                    with place.pair(kind, template) as pair:
                        verdicts = iter([pair.run(steps_of(options.series), options.words)])
                else:
                    share = len(range(at, options.count, len(templates)))
                    verdicts = compared(place, kind, template, share, number + at)
                for verdict in verdicts:
                    tell(row(verdict))
                    known = totals.get(kind, (0, 0, 0))
                    totals[kind] = tuple(map(sum, zip(known, verdict.sums, strict=True)))
                    if verdict.troubles:
                        failed.append(verdict)
                        tell(f"    {verdict.written}")
                    if options.verbose or verdict.troubles:
                        tell("\n".join(verdict.requests()))
        if not options.no_shorten and not options.series:
            for verdict in failed:
                short = shortened(place, verdict)
                if short is None:
                    tell(f"{verdict.words}: not on new servers")
                    continue
                tell(f"shortened: --words {short.words} --series {short.written}")
                tell("\n".join([row(short), *short.requests()]))
    for kind, sums in totals.items():
        tell(f"{kind}: keepwarm {sums[0]}, bare {sums[1]}, least {sums[2]}")
    tell(f"{len(failed)} series failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
