"""What routing does to answers: is a routed request answered worse than one with everything?

    python -m benchmarks.routing_answers --model qwen2.5-coder-0.5b.gguf

The 72 tasks of the routing benchmark, each asked of one Keepwarm with every tier named in turn
(*always minimal*, *always standard*, *always full*) and with `model: auto` (*routed*, escalation
included). Answers are judged by the rules of `routing_rules`. It also counts how a tier that is too
small fails: how often it asks for more (`NEED_MORE`), and how often it is told in some other way;
and what a tier too large spoils: simple tasks that are answered right with minimal and wrong with
more. Writes answers.json to --out and tables to the terminal; `--judge FILE` judges answers that
were written before, without an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console

from benchmarks.options import add_options, settings_of
from benchmarks.routing_report import tier_of
from benchmarks.routing_rules import RULES
from benchmarks.routing_tasks import TASKS
from keepwarm.bench.client import ChatClient
from keepwarm.bench.report import md_table
from keepwarm.bench.servers import KeepwarmServer, Workplace
from keepwarm.core.reply import counts_of, read_reply
from keepwarm.errors import EngineError, KeepwarmError
from keepwarm.router import AUTO, TIERS, escalation_needed
from keepwarm.settings import Settings, StoreSettings

_TIMEOUT_S = 900.0
ARMS = (*TIERS, AUTO)


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One task's answer. `used` is the tier that answered, `chosen` the one it was sent to."""

    kind: str
    task: str
    arm: str
    chosen: str
    used: str
    text: str
    calls: tuple[str, ...] = ()
    finish: str = ""
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    decode_s: float = 0.0

    @property
    def is_right(self) -> bool:
        """By the task's rule."""
        return RULES[self.task].is_met(self.text, self.calls)

    @property
    def escalates(self) -> str:
        """Why this very reply would be replayed one tier up; '' if it stands."""
        found = escalation_needed(
            self.text,
            tier=self.used,
            finish_reason=self.finish or "stop",
            tool_calls=self.calls,
            known_tools=() if self.used == TIERS[0] else self.calls,
        )
        return found.cause.value if found else ""


async def ask(
    session: aiohttp.ClientSession, url: str, *, kind: str, task: str, arm: str, reply_tokens: int
) -> Answered:
    """Ask one task as a client would.

    Raises:
        EngineError: no answer, or one without counts.
    """
    body = {
        "model": arm,
        "messages": [{"role": "user", "content": task}],
        "max_tokens": reply_tokens,
        "temperature": 0,
    }
    async with session.post(url + "/v1/chat/completions", json=body) as response:
        raw = await response.read()
        if response.status != 200:
            raise EngineError(f"{arm}: {response.status}: {raw[:300].decode('utf-8', 'replace')}")
        header = response.headers.get("X-Keepwarm-Tier", "")
    reply = read_reply(raw, streamed=False)
    whole: dict[str, Any] = msgspec.json.decode(raw)
    counts = counts_of(whole)
    if counts is None:
        raise EngineError("The reply holds no token counts.")
    message = whole["choices"][0]["message"]
    chosen, used = tier_of(header)
    return Answered(
        kind=kind,
        task=task,
        arm=arm,
        chosen=chosen,
        used=used,
        text=message.get("content") or "",
        calls=reply.calls,
        finish=reply.finish_reason or "",
        prompt_tokens=counts.prompt,
        decoded_tokens=counts.decoded,
        decode_s=counts.decode_s,
    )


async def run(
    settings: Settings, *, arms: Sequence[str], reply_tokens: int, out: Path, console: Console
) -> list[Answered]:
    """All tasks of all arms; what is answered is written as it comes.

    Raises:
        KeepwarmError: the server didn't start or answer; it was ended.
    """
    found: list[Answered] = []
    async with AsyncExitStack() as stack:
        place = stack.enter_context(Workplace(settings.store.staging_bytes))
        client = ChatClient()
        stack.push_async_callback(client.close)
        store = place.store("store")
        kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
        own = msgspec.structs.replace(settings, store=kept)
        server = KeepwarmServer(own, directory=place.root, client=client)
        server.forget()
        stack.push_async_callback(server.stop)
        console.print("warming the tiers")
        await server.start()
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))
        stack.push_async_callback(session.close)
        for arm in arms:
            for kind, texts in TASKS.items():
                console.print(f"always {arm}: tasks for {kind}")
                for text in texts:
                    answered = await ask(
                        session,
                        server.base_url,
                        kind=kind,
                        task=text,
                        arm=arm,
                        reply_tokens=reply_tokens,
                    )
                    found.append(answered)
                    out.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    return found


def tables(found: Sequence[Answered]) -> list[str]:
    """What the answers come to, as Markdown."""
    arms = [arm for arm in ARMS if any(each.arm == arm for each in found)]
    rows = []
    for arm in arms:
        of_arm = [each for each in found if each.arm == arm]
        right = [sum(e.is_right for e in of_arm if e.kind == kind) for kind in TIERS]
        tokens = sum(e.decoded_tokens for e in of_arm)
        seconds = sum(e.decode_s for e in of_arm)
        name = "routed" if arm == AUTO else f"always {arm}"
        cells = (*right, sum(right), len(of_arm), f"{tokens / len(of_arm):.0f}")
        rows.append((name, *map(str, cells), f"{tokens / seconds:.1f}" if seconds else "-"))
    heads = ("asked", *(f"right: {kind}" for kind in TIERS), "all", "of", "reply", "tokens/s")
    out = ["**Answers by the rules**", "", *md_table(heads, rows, left=(0,))]
    rows = []
    for tier in TIERS[:-1]:
        for kind in TIERS:
            these = [e for e in found if e.arm == tier and e.kind == kind]
            causes = [e.escalates for e in these]
            asked = sum(cause.startswith("asked") for cause in causes)
            other = sum(bool(cause) for cause in causes) - asked
            stands = sum(not e.escalates and not e.is_right for e in these)
            if these:
                cells = (len(these), asked, other, sum(e.is_right for e in these), stands)
                rows.append((tier, kind, *map(str, cells)))
    heads = ("tier", "tasks for", "n", "asks for more", "seen otherwise", "right", "wrong, stands")
    return [*out, "", "**Replies that are replayed one tier up**", "",
            *md_table(heads, rows, left=(0, 1))]  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    if "--judge" not in sys.argv:
        add_options(parser)
    parser.add_argument("--judge", type=Path, help="answers written before; no engine is started")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--reply-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("answers.json"))
    args = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    if args.judge:
        found = msgspec.json.decode(args.judge.read_bytes(), type=list[Answered])
    else:
        try:
            settings, _ = settings_of(args)
            going = run(
                settings,
                arms=args.arms,
                reply_tokens=args.reply_tokens,
                out=args.out,
                console=console,
            )
            found = asyncio.run(going)
        except KeepwarmError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("interrupted; the server was ended")
    sys.stdout.write("\n".join(tables(found)) + "\n")


if __name__ == "__main__":
    main()
