"""A pile of tasks: Keepwarm's nights against plain clients of a llama-server, in one run.

    python -m benchmarks.batch_night --model m.gguf --chat-template t.jinja

96 tasks over 12 contexts of about 900 tokens and the deployment's tiers, shuffled, on 4 slots. The
arms, one after another, each on an engine that was just started:

1. *plain*: the file's order, sent by as many clients as there are slots to a llama-server with its
   defaults, each request with its tier's text and tools in full;
2. *first night*: Keepwarm with an empty store; *second night*: restarted, its store kept;
3. *plain alone* and *keepwarm alone*: tasks that share nothing, neither tier nor text.

Seconds count from the start of the server's process to the last result, so loading, and warming the
tiers, are in them. Prefilled tokens are the engine's own counts, warming included; the least
possible is counted on the prompts' real tokens. Writes one JSON object to standard output, and
reports and pictures of the nights to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.options import add_options, settings_of
from keepwarm.batch.job import BatchPaths, BatchRun, read_tasks
from keepwarm.batch.senders import HttpSender
from keepwarm.bench.client import ChatClient
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.servers import KeepwarmServer, Server, Workplace, bare_engine
from keepwarm.core.tiers import Tier, TierSet, compose
from keepwarm.engine.attach import plan_launch
from keepwarm.engine.client import EngineClient
from keepwarm.errors import ConfigError
from keepwarm.settings import (
    BatchSettings,
    Settings,
    StoreSettings,
)

# 900 tokens: such text, full of numbers, has 3.2 characters a token with SmolLM2's tokenizer.
CONTEXT_CHARS = 2860
_SUBJECTS = ("The pump", "A courier", "The north gate", "Her ledger", "The old crane", "A buyer")
_VERBS = ("reported", "crossed", "delayed", "measured", "repaired", "counted", "sealed", "weighed")
_OBJECTS = ("the copper pipes", "two crates of glass", "the river road", "a set of maps")
_WHEN = ("before noon", "on the third day", "after the storm", "while the market was open")
_ASKED = ("What came first", "Who was late", "Which item is missing", "Where did it happen")


@dataclass(frozen=True, slots=True)
class PileScale:
    """How large the pile is."""

    tasks: int = 96
    contexts: int = 12
    alone: int = 48
    reply_tokens: int = 16
    seed: int = 7


@dataclass(frozen=True, slots=True)
class NightArm:
    """What one arm took. Seconds from its process's start; tokens as the engine counted them."""

    name: str
    tasks: int
    ready_s: float
    total_s: float
    prefilled_tokens: int
    reused_tokens: int
    least_tokens: int | None = None

    @property
    def tasks_an_hour(self) -> float:
        """With loading and warming."""
        return 3600 * self.tasks / self.total_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**rounded, "tasks_an_hour": round(self.tasks_an_hour, 1)}


def context_text(number: int, seed: int) -> str:
    """A context unlike any other from its first words on."""
    chance = random.Random(f"{seed}/{number}")  # noqa: S311 - not for secrets
    text = f"Record {number * 37 + 11} of the harbour office. "
    line = 0
    while len(text) < CONTEXT_CHARS:
        line += 1
        words = (chance.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _WHEN))
        text += f"Entry {line}: " + " ".join(words) + f", at a cost of {chance.randrange(900)}. "
    return text.strip()


def pile(tiers: TierSet, scale: PileScale) -> list[dict[str, Any]]:
    """The shuffled file: each context has one tier, and as many tasks as the others."""
    names = list(tiers.names)
    chance = random.Random(scale.seed)  # noqa: S311
    out = []
    for number in range(scale.tasks):
        about = number % scale.contexts
        asked = f"{chance.choice(_ASKED)} in entry {chance.randrange(2, 40)}, question {number}?"
        text = f"{context_text(about, scale.seed)}\n\n{asked}"
        out.append(_task(f"task-{number}", names[about % len(names)], text, scale))
    chance.shuffle(out)
    return out


def unshared(scale: PileScale) -> list[dict[str, Any]]:
    """Tasks of the same length that have nothing in common, and no tier."""
    return [
        _task(f"alone-{n}", "any", f"{n + 501} {context_text(1000 + n, scale.seed)}", scale)
        for n in range(scale.alone)
    ]


def _task(custom_id: str, model: str, text: str, scale: PileScale) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": scale.reply_tokens,
        "temperature": 0,
        # Every arm decodes as much, whatever the model would rather say.
        "ignore_eos": True,
    }
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def composed(task: dict[str, Any], tiers: TierSet) -> dict[str, Any]:
    """A task's body as a plain server needs it, with its tier's text and tools."""
    tier: Tier | None = tiers.get(task["body"]["model"])
    return compose(tier, task["body"]) if tier else dict(task["body"])


async def plain_arm(
    name: str, server: Server, client: ChatClient, bodies: Sequence[dict[str, Any]], *, lanes: int
) -> NightArm:
    """The file's order, by as many clients as there are slots."""
    began_s = time.perf_counter()
    await server.start()
    ready_s = time.perf_counter() - began_s
    left = list(reversed(bodies))
    prefilled = reused = 0

    async def lane() -> None:
        nonlocal prefilled, reused
        while left:
            answer = await client.ask(server.base_url, left.pop())
            prefilled += answer.counts.prefilled
            reused += answer.counts.cached

    try:
        await asyncio.gather(*(lane() for _ in range(lanes)))
        total_s = time.perf_counter() - began_s
    finally:
        await server.stop()
    return NightArm(name, len(bodies), ready_s, total_s, prefilled, reused)


async def keepwarm_arm(
    name: str, server: KeepwarmServer, tasks: Sequence[dict[str, Any]], out: Path, *, lanes: int
) -> NightArm:
    """A night, with its journal, report and picture in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name.replace(' ', '-')}.tasks.jsonl"
    file.write_bytes(b"".join(msgspec.json.encode(task) + b"\n" for task in tasks))
    paths = BatchPaths.beside(file, out / f"{name.replace(' ', '-')}.jsonl")
    for path in (paths.results, paths.errors, paths.journal):
        path.unlink(missing_ok=True)
    server.warmed = []
    began_s = time.perf_counter()
    await server.start()
    ready_s = time.perf_counter() - began_s
    tiers = {str(w["name"]).removeprefix("tier:"): int(w["tokens"]) for w in server.warmed}
    try:
        job = BatchRun(paths, read_tasks(file), tier_tokens=tiers, lanes=lanes)
        try:
            async with HttpSender(server.base_url) as sender:
                await job.runner(sender).run()
            total_s = time.perf_counter() - began_s
            report = job.write_report()
        finally:
            job.close()
    finally:
        await server.stop()
    if report["failed"] or report["left"]:
        raise ConfigError(f"{report['failed']} tasks failed; see {paths.errors}.")
    warming = sum(int(w["prefilled_tokens"]) for w in server.warmed)
    return NightArm(
        name,
        len(tasks),
        ready_s,
        total_s,
        report["prefilled_tokens"] + warming,
        report["reused_tokens"],
    )


async def least_tokens(
    base_url: str, bodies: Sequence[dict[str, Any]], tiers: TierSet
) -> tuple[int, int]:
    """The fewest tokens that must be prefilled, from the prompts' real ones.

    Returns:
        With nothing kept: each token that differs from all others' before it, and the tiers.
        With everything kept that two prompts share: what each prompt has for itself.
    """
    client = EngineClient(base_url)
    probe = {"role": "user", "content": "x"}
    static = [compose(tier, {"messages": [probe]}) for tier in tiers]
    rendered = [await client.render(body) for body in (*bodies, *static)]
    prompts = [await client.tokenize(text) for text in rendered]
    own = sorted(prompts[: len(bodies)])
    everything = sorted(prompts)
    unique = sum(
        len(b) - _common(a, b) for a, b in zip([[], *everything[:-1]], everything, strict=True)
    )
    alone = 0
    for index, prompt in enumerate(own):
        beside = [own[i] for i in (index - 1, index + 1) if 0 <= i < len(own)]
        alone += max(len(prompt) - max((_common(prompt, b) for b in beside), default=0), 1)
    return unique, alone


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


async def run(settings: Settings, tiers: TierSet, scale: PileScale, out: Path) -> dict[str, Any]:
    """All arms, one after another."""
    lanes = settings.engine.slots
    tasks, alone = pile(tiers, scale), unshared(scale)
    bodies = [composed(task, tiers) for task in tasks]
    client = ChatClient()
    with Workplace(settings.store.staging_bytes) as place:
        store = place.store("store")
        kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
        settings = msgspec.structs.replace(
            settings, store=kept, batch=BatchSettings(dir=str(place.root / "batches"))
        )
        launch = await plan_launch(settings.engine, slot_dir=place.root)
        assert launch.options
        plain = bare_engine(launch.options, binary=launch.binary, client=client, defaults=True)
        keepwarm = KeepwarmServer(settings, directory=place.root, client=client)
        keepwarm.forget()

        def tell(arm: NightArm) -> NightArm:
            sys.stderr.write(f"{arm.name}: {arm.total_s:.1f} s, {arm.tasks_an_hour:.0f} an hour\n")
            return arm

        try:
            await plain.start()
            least = await least_tokens(plain.base_url, bodies, tiers)
            await plain.stop()
            arms = [tell(await plain_arm("plain", plain, client, bodies, lanes=lanes))]
            first = await keepwarm_arm("first night", keepwarm, tasks, out, lanes=lanes)
            second = await keepwarm_arm("second night", keepwarm, tasks, out, lanes=lanes)
            arms += [tell(_with_least(first, least[0])), tell(_with_least(second, least[1]))]
            both = await _alone(plain, keepwarm, client, tasks=alone, out=out, lanes=lanes)
            arms += [tell(arm) for arm in both]
        finally:
            for server in (plain, keepwarm):
                await server.stop()
            await client.close()
    return {"scale": asdict(scale), "slots": lanes, "arms": [a.as_dict() for a in arms]} | {
        "figures": figures({arm.name: arm for arm in arms})
    }


async def _alone(
    plain: Server,
    keepwarm: KeepwarmServer,
    client: ChatClient,
    *,
    tasks: Sequence[dict[str, Any]],
    out: Path,
    lanes: int,
) -> list[NightArm]:
    """Both arms on tasks that share nothing: one, the other twice, and the first again.

    So a machine that slows down or speeds up meanwhile does so for both.
    """
    half = len(tasks) // 2
    halves = (tasks[:half], tasks[half:])
    bodies = [[dict(task["body"]) for task in part] for part in halves]
    first = await plain_arm("plain alone", plain, client, bodies[0], lanes=lanes)
    second = await keepwarm_arm("keepwarm alone", keepwarm, halves[0], out, lanes=lanes)
    third = await keepwarm_arm("keepwarm alone", keepwarm, halves[1], out, lanes=lanes)
    fourth = await plain_arm("plain alone", plain, client, bodies[1], lanes=lanes)
    return [_summed(first, fourth), _summed(second, third)]


def _summed(one: NightArm, other: NightArm) -> NightArm:
    return NightArm(
        one.name,
        one.tasks + other.tasks,
        one.ready_s + other.ready_s,
        one.total_s + other.total_s,
        one.prefilled_tokens + other.prefilled_tokens,
        one.reused_tokens + other.reused_tokens,
    )


def _with_least(arm: NightArm, least: int) -> NightArm:
    return NightArm(
        arm.name,
        arm.tasks,
        arm.ready_s,
        arm.total_s,
        arm.prefilled_tokens,
        arm.reused_tokens,
        least,
    )


def figures(arms: dict[str, NightArm]) -> dict[str, float]:
    """The ratios that are asked for."""
    plain, first, second = arms["plain"], arms["first night"], arms["second night"]
    alone = arms["keepwarm alone"]
    own_s = alone.total_s - alone.ready_s
    plain_s = arms["plain alone"].total_s - arms["plain alone"].ready_s
    return {
        "first_night_times_plain": round(plain.total_s / first.total_s, 2),
        "second_night_times_plain": round(plain.total_s / second.total_s, 2),
        "first_night_over_least_percent": _over(first),
        "second_night_over_least_percent": _over(second),
        # Loading and warming aside: what the gateway and the journal cost a task.
        "alone_slower_percent": round(100 * (own_s / plain_s - 1), 1),
    }


def _over(arm: NightArm) -> float:
    assert arm.least_tokens
    return round(100 * (arm.prefilled_tokens / arm.least_tokens - 1), 1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("batch-night-results"))
    for name, value in asdict(PileScale()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    settings, tiers = settings_of(args)
    scale = PileScale(**{name: getattr(args, name) for name in asdict(PileScale())})
    report = asyncio.run(run(settings, tiers, scale, args.out))
    report["machine"] = msgspec.to_builtins(machine())
    report["model"] = describe_model(Path(args.model))
    text = json.dumps(report, indent=2)
    (args.out / "batch-night.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
