"""When llama-server's `--cache-reuse` helps, and what it does to the answer.

    python -m benchmarks.cache_reuse --model m.gguf --chat-template t.jinja --runs 3

A slot holds a prompt of some 2,000 tokens. Then comes the same prompt with a line near its top
changed, with that line removed, or with an old turn dropped from the middle of the conversation.
Each is asked three ways on a bare engine, from the same state (saved once, restored before each):
evaluated in full, with the common prefix alone (`n_cache_reuse` 0, the default), and with moved
chunks of at least 256 tokens shifted to their new place. `n_cache_reuse` in a request is what
`--cache-reuse` sets for all. Then the same conversations go through Keepwarm. At temperature 0 the
continuation's token ids and the first token's logprobs are compared with those of the full prefill;
what the common prefix alone changes is the floor, since the batches are split otherwise there.

Writes JSON and Markdown to the output directory, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keepwarm import __version__
from keepwarm.bench.arms import KEEPWARM, Record
from keepwarm.bench.client import ChatClient
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.prompts import Turn, assistant, rules, user
from keepwarm.bench.report import markdown, terminal
from keepwarm.bench.results import Amount, BenchReport, Figure, Sample, select, ttfts, write_json
from keepwarm.bench.servers import KeepwarmServer, Workplace, bare_engine
from keepwarm.bench.stats import median, rotated, times_faster
from keepwarm.core.reply import Counts, counts_of
from keepwarm.engine.attach import plan_launch
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineError, KeepwarmError
from keepwarm.settings import EngineSettings, Settings, StoreSettings, TierSettings
from keepwarm.tiers.files import find_tiers_directory, load_tiers

SCENARIO = "cache_reuse"
CHUNK_TOKENS = 256
FULL, PREFIX, SHIFTED = "full prefill", "common prefix", f"shifted, {CHUNK_TOKENS}"
WAYS = (FULL, PREFIX, SHIFTED)
CHANGED, REMOVED, DROPPED = "line changed", "line removed", "old turn dropped"
SAME_IDS, LOGPROB = "% of the ids of a full prefill", "largest difference of the first logprobs"
# They come to some 2,000 tokens in a small vocabulary.
PROMPT_CHARS = 7600
_TURNS, _DROPPED_TURN = 8, 2
_REPLY_TOKENS = 32
# Between two requests of one client, while an agent runs a tool: the slot is saved meanwhile.
_THINKING_S = 1.0
# Of this many of the likeliest first tokens the logprobs are compared.
_TOP = 10
_FILE = "cache-reuse"
# Only what was removed or dropped answers it: state that was computed behind that may still know.
_WORD = "The word of the day is lantern. "
_OTHER_WORD = "The word of the day, by the way, is harbour. "
_QUESTION = "What is the word of the day?"


@dataclass(frozen=True, slots=True)
class Case:
    """What a slot holds, and what is asked of it then: two lists of messages."""

    name: str
    held: Sequence[Turn]
    asked: Sequence[Turn]


@dataclass(frozen=True, slots=True)
class Continuation:
    """One continuation: its ids, the first token's logprobs by id, counts, and seconds."""

    ids: tuple[int, ...]
    first: Mapping[int, float]
    counts: Counts
    ttft_s: float
    total_s: float


def cases_of(run: int, *, chars: int = PROMPT_CHARS) -> list[Case]:
    """The three cases, of other text in each run so that none begins like another."""
    text = f"Agent {run + 1} keeps these rules.\n{rules(chars, start=31 * run + 1)}"
    question = user(_QUESTION)
    head, lines = text.split("\n", 1)

    def system(line: str) -> Turn:
        return {"role": "system", "content": f"{head}\n{line}{lines}"}

    def talk(left_out: int | None) -> list[Turn]:
        turns: list[Turn] = [{"role": "system", "content": head}]
        size = len(lines) // _TURNS
        for turn in range(_TURNS):
            if turn != left_out:
                part = _WORD if turn == _DROPPED_TURN else ""
                part += lines[turn * size : (turn + 1) * size]
                turns += [user(f"Note {turn + 1}: {part}"), assistant(f"Noted {turn + 1}.")]
        return turns

    word, other = f"{_WORD}\n", f"{_OTHER_WORD}\n"
    return [
        Case(CHANGED, [system(word), question], [system(other), question]),
        Case(REMOVED, [system(word), question], [system(""), question]),
        Case(DROPPED, [*talk(None), question], [*talk(_DROPPED_TURN), question]),
    ]


def same_ids(told: Sequence[int], reference: Sequence[int]) -> float:
    """The share of positions with the same id, in percent of the longer one."""
    longest = max(len(told), len(reference))
    equal = sum(a == b for a, b in zip(told, reference, strict=False))
    return 100 * equal / longest if longest else 100.0


def largest_difference(told: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """The largest difference of logprobs over the tokens that both name.

    Raises:
        ValueError: they name no token in common.
    """
    both = told.keys() & reference.keys()
    if not both:
        raise ValueError("the first tokens' likeliest ids have none in common")
    return max(abs(told[i] - reference[i]) for i in both)


def figures_of(samples: Sequence[Sample], amounts: Sequence[Amount]) -> list[Figure]:
    """What shifting saves, case by case, and what it changes beside what a split changes."""
    out = []
    for case in dict.fromkeys(s.step for s in samples):
        plain, shifted = (select(samples, step=case, arm=arm) for arm in (PREFIX, SHIFTED))
        if not plain or not shifted:
            continue
        prefilled = [median([s.prefilled_tokens for s in each]) for each in (plain, shifted)]
        out.append(
            Figure(
                what=f"{case}: TTFT with moved chunks shifted against the common prefix alone",
                value=times_faster(ttfts(plain), ttfts(shifted)),
                unit="times faster",
                detail=f"{prefilled[0]:,.0f} tokens prefilled, {prefilled[1]:,.0f} when shifted",
            )
        )
        for unit, worst in ((SAME_IDS, min), (LOGPROB, max)):
            values = {
                arm: [a.value for a in amounts if (a.step, a.arm, a.unit) == (case, arm, unit)]
                for arm in (PREFIX, SHIFTED)
            }
            if all(values.values()):
                out.append(
                    Figure(
                        what=f"{case}: the answer when shifted, the worst run",
                        value=worst(values[SHIFTED]),
                        unit=unit,
                        detail=f"{worst(values[PREFIX]):.3g} with the common prefix alone",
                    )
                )
    return out


class _Bare:
    """Asks one slot of a bare engine."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def tokens(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation's tokens, as the engine renders it."""
        return await self._client.tokenize(await self._client.render({"messages": list(turns)}))

    async def hold(self, tokens: Sequence[int]) -> None:
        """Fill the slot with these tokens and a short reply, and save it."""
        await self.ask(tokens, cache_prompt=False, n_predict=1)
        await self._client.save(0, _FILE)

    async def ask_held(self, tokens: Sequence[int], way: str) -> Continuation:
        """Ask one of the three ways, from what is held."""
        await self._client.restore(0, _FILE)
        return await self.ask(
            tokens,
            cache_prompt=way != FULL,
            n_cache_reuse=CHUNK_TOKENS if way == SHIFTED else 0,
        )

    async def ask(self, tokens: Sequence[int], **more: object) -> Continuation:
        """One completion, streamed.

        Raises:
            EngineError: no whole answer with counts and logprobs.
        """
        body = {
            "prompt": list(tokens),
            "n_predict": _REPLY_TOKENS,
            "temperature": 0,
            "n_probs": _TOP,
            "id_slot": 0,
            "stream": True,
            "ignore_eos": True,
            **more,
        }
        began = time.perf_counter()
        first_s: float | None = None
        counts: Counts | None = None
        probs: list[dict[str, Any]] = []
        async for event in self._client.stream(body):
            first_s = first_s or time.perf_counter()
            counts = counts_of(event) or counts
            probs += event.get("completion_probabilities") or []
        ended = time.perf_counter()
        if counts is None or not probs or first_s is None:
            raise EngineError("The engine's completion holds no counts or no logprobs.")
        top = {int(p["id"]): float(p["logprob"]) for p in probs[0]["top_logprobs"]}
        ids = tuple(int(p["id"]) for p in probs)
        return Continuation(ids, top, counts, first_s - began, ended - began)


async def on_bare(
    bare: _Bare, cases: Sequence[Case], record: Record, *, run: int, step: Callable[[str], None]
) -> None:
    """All ways of all cases on the bare engine, compared with the full prefill."""
    for case in cases:
        step(f"{case.name}: filling")
        await bare.hold(await bare.tokens(case.held))
        tokens = await bare.tokens(case.asked)
        told: dict[str, Continuation] = {}
        for way in rotated(WAYS, run):
            step(f"{case.name}: {way}")
            told[way] = await bare.ask_held(tokens, way)
        for way, one in told.items():
            counts = one.counts
            record.samples.append(
                Sample(
                    scenario=SCENARIO,
                    step=case.name,
                    arm=way,
                    run=run,
                    ttft_s=one.ttft_s,
                    total_s=one.total_s,
                    cached_tokens=counts.cached,
                    prefilled_tokens=counts.prefilled,
                    decoded_tokens=counts.decoded,
                )
            )
            if way == FULL:
                continue
            for value, unit in (
                (same_ids(one.ids, told[FULL].ids), SAME_IDS),
                (largest_difference(one.first, told[FULL].first), LOGPROB),
            ):
                record.amount(value, unit, scenario=SCENARIO, step=case.name, arm=way, run=run)


async def through_keepwarm(
    server: KeepwarmServer,
    client: ChatClient,
    cases: Sequence[Case],
    record: Record,
    *,
    run: int,
    step: Callable[[str], None],
) -> None:
    """Each case as two requests of one client. What was filled ahead counts as prefilled."""
    for case in cases:
        for turns in (case.held, case.asked):
            step(f"{case.name}: {KEEPWARM}")
            body = {
                "model": "own",
                "messages": list(turns),
                "max_tokens": _REPLY_TOKENS,
                "temperature": 0,
            }
            answer = await client.ask(server.base_url, body)
            await asyncio.sleep(_THINKING_S)
        counts = answer.counts
        record.samples.append(
            Sample(
                scenario=SCENARIO,
                step=case.name,
                arm=KEEPWARM,
                run=run,
                ttft_s=answer.ttft_s,
                total_s=answer.total_s,
                cached_tokens=counts.cached - answer.filled_tokens,
                prefilled_tokens=counts.prefilled + answer.filled_tokens,
                decoded_tokens=counts.decoded,
                plan=answer.plan,
            )
        )


async def measure(
    settings: Settings, *, runs: int, chars: int, step: Callable[[str], None]
) -> BenchReport:
    """All of it; see the module. The bare engine ends before Keepwarm's begins."""
    began, began_s, busy = datetime.now().astimezone(), time.perf_counter(), machine()
    record, client = Record(), ChatClient()
    with Workplace(settings.store.staging_bytes) as place:
        store = place.store("store")
        kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
        settings = msgspec.structs.replace(settings, store=kept)
        launch = await plan_launch(settings.engine, slot_dir=place.store("bare"))
        assert launch.options
        bare = bare_engine(launch.options, binary=launch.binary, client=client, defaults=False)
        keepwarm = KeepwarmServer(settings, directory=place.root, client=client)
        asking = EngineClient(bare.base_url)
        try:
            await bare.start()
            for run in range(runs):
                asks = _Bare(asking)
                await on_bare(asks, cases_of(run, chars=chars), record, run=run, step=step)
            await bare.stop()
            await keepwarm.start()
            for run in range(runs):
                await through_keepwarm(
                    keepwarm, client, cases_of(run, chars=chars), record, run=run, step=step
                )
        finally:
            for server in (bare, keepwarm):
                await server.stop()
            await client.close()
    return BenchReport(
        kind=SCENARIO,
        keepwarm=__version__,
        began=began.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began_s, 1),
        machine=busy,
        engine=f"{launch.identity.kind} {launch.identity.build}",
        model=describe_model(Path(settings.engine.model)),
        settings={"runs": str(runs), "reply tokens": str(_REPLY_TOKENS)},
        samples=record.samples,
        amounts=record.amounts,
        figures=figures_of(record.samples, record.amounts),
    )


def steps_of(runs: int) -> int:
    """How many steps `measure` tells: each case is filled, asked each way, and asked twice more."""
    return runs * len(cases_of(0)) * (1 + len(WAYS) + 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a GGUF model")
    parser.add_argument("--engine", default="", help="a llama-server binary; default: embedded")
    parser.add_argument("--chat-template", default="", help="a Jinja template; default: its own")
    parser.add_argument("--tiers", type=Path, default=None, help="only its smallest is warmed")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--runs", type=int, default=3, help="each with other text; default: 3")
    parser.add_argument("--prompt-chars", type=int, default=PROMPT_CHARS, help="its size")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--markdown", action="store_true", help="print it as Markdown")
    return parser.parse_args()


def main() -> None:
    """See the module."""
    args = _arguments()
    directory = find_tiers_directory(args.tiers, Path.home() / ".config")
    smallest = next(iter(load_tiers(directory, TierSettings().agent_name))).name
    settings = Settings(
        engine=EngineSettings(
            model=args.model,
            binary=args.engine,
            chat_template=args.chat_template,
            threads=args.threads,
        ),
        tiers=TierSettings(dir=str(directory.absolute()), warm=(smallest,)),
    )
    err = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        bar = progress.add_task("starting the engine", total=steps_of(args.runs))

        def step(what: str) -> None:
            progress.update(bar, description=what, advance=1)

        try:
            report = asyncio.run(
                measure(settings, runs=args.runs, chars=args.prompt_chars, step=step)
            )
        except KeyboardInterrupt:
            sys.exit("interrupted: everything that was started has been ended")
        except KeepwarmError as error:
            sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(report, args.out / "cache-reuse.json")
    text = markdown(report)
    (args.out / "cache-reuse.md").write_text(text, encoding="utf-8")
    if args.json:
        sys.stdout.write((args.out / "cache-reuse.json").read_text(encoding="utf-8"))
    elif args.markdown:
        sys.stdout.write(text)
    else:
        Console(highlight=False).print(terminal(report))


if __name__ == "__main__":
    main()
