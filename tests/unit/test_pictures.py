"""Prompts with pictures: what identifies them, what is kept of them, and what only a slot has."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.contents import after_count, after_reply, while_unsure
from keepwarm.core.effects import EraseSlot
from keepwarm.core.job import Job
from keepwarm.core.plan import Demand, Machine, Source, Stored, choose, doubt_tokens
from keepwarm.core.prompt import Prompt, prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.returns import first_turn
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import Content, Position, Slot, SlotState, loss
from keepwarm.core.tree import as_tokens
from keepwarm.engine.counting import PromptCounter
from keepwarm.slotfile import Layout
from keepwarm.store.types import KeptMark
from storesamples import (
    HYBRID,
    PLAIN,
    WINDOWED,
    NoSyncDisk,
    opened,
    pictured_file,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

MACHINE = Machine(row_bytes=1000, cuttable=True, can_save=True, pool_tokens=None)
RULES = {"role": "system", "content": "Follow the rules of the house. " * 40}
TEXT_TOKENS, ALL_TOKENS = 300, 900


def seen(name: str) -> dict[str, Any]:
    data = name * 400
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def asking(*parts: dict[str, Any], system: dict[str, Any] = RULES) -> Prompt:
    messages = [system, {"role": "user", "content": list(parts)}]
    return prompt_of({"messages": messages}, fingerprint="f", namespace="n")


def shared(one: Prompt, other: Prompt) -> int:
    """Marks that two prompts begin with alike."""
    pairs = list(zip(one.marks, other.marks, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


class TestIdentity:
    def test_another_picture_is_another_prompt_from_there_on(self) -> None:
        long = "What is to be seen in it? " * 40
        one, other = asking(seen("A"), words(long)), asking(seen("B"), words(long))
        assert shared(one, other) == one.text_index + 1
        assert one.marks[one.text_index].digest == one.static.digest  # type: ignore[union-attr]
        assert shared(one, asking(seen("A"), words(long))) == len(one.marks)

    def test_text_before_a_picture_is_shared_and_text_behind_it_is_not(self) -> None:
        long = "What is to be seen in it? " * 40
        one, other = asking(words(long), seen("A")), asking(words(long), seen("B"))
        assert shared(one, other) == one.text_index + 1
        assert one.marks[one.text_index].chars > one.static.chars  # type: ignore[union-attr]

    def test_the_order_of_text_and_picture_counts(self) -> None:
        one, other = asking(seen("A"), words("What?")), asking(words("What?"), seen("A"))
        assert one.marks[-1] != other.marks[-1]
        between = asking(words("What?"), seen("A"), words("And?"), seen("B"))
        after = asking(words("What?"), seen("A"), seen("B"), words("And?"))
        assert between.marks[-1] != after.marks[-1]

    def test_a_static_part_with_a_picture_is_none(self) -> None:
        system = {"role": "system", "content": [words("Look: "), seen("A")]}
        assert asking(words("What?"), system=system).static is None


def job_of(prompt: Prompt, **more: Any) -> Job:
    return replace(Job("j", "n", prompt, 0.0, 9e9, chat={"messages": []}), **more)


def replied(job: Job, before: Content | None = None, *, cached: int = 0) -> Content:
    counts = Counts(cached, ALL_TOKENS - cached, 8, prefill_s=1.0, decode_s=0.1)
    return after_reply(job, before, counts, None, returns=first_turn())


PROMPT = asking(words("Look at this: "), seen("A"), words("What is it?"))
TEXT = as_tokens(range(TEXT_TOKENS))


class TestSlots:
    def test_a_slot_knows_where_its_first_picture_is(self) -> None:
        counted = replied(job_of(PROMPT, text_ids=TEXT))
        assert (counted.media_at, counted.counted_tokens) == (TEXT_TOKENS, TEXT_TOKENS)
        assert counted.savable_tokens == TEXT_TOKENS
        assert counted.chat is None, "the rest of it can't be counted"
        # Behind it the conversation goes on in the same slot.
        assert replied(job_of(PROMPT), counted, cached=ALL_TOKENS - 50).media_at == TEXT_TOKENS
        estimated = replied(job_of(PROMPT)).media_at
        assert estimated is not None
        assert 0 < estimated < ALL_TOKENS
        left = while_unsure(job_of(PROMPT, text_ids=TEXT), None)
        assert left is not None
        assert left.media_at == TEXT_TOKENS
        assert replied(job_of(asking(words("What?")))).media_at is None

    def test_an_engine_that_saves_no_pictures_isnt_asked_at_each_turn(self) -> None:
        content = replied(job_of(PROMPT, text_ids=TEXT))
        content.save_failed = True
        assert replied(job_of(PROMPT), content, cached=ALL_TOKENS - 50).save_failed
        assert not replied(job_of(asking(words("What?"))), content, cached=20).save_failed

    def test_a_file_tells_what_comes_before_and_leaves_the_states_behind(self) -> None:
        content = replied(job_of(PROMPT))
        content.states = tuple(Position(at, exact=False) for at in (100, 400, ALL_TOKENS))
        after_count(content, TEXT, (100, 280))
        assert content.media_at == TEXT_TOKENS
        assert [(s.tokens, s.exact) for s in content.states] == [
            *((100, True), (280, True), (400, False), (ALL_TOKENS, False))
        ]

    def test_what_only_the_slot_can_have_is_lost_with_it_and_saved_for_nothing(self) -> None:
        def lost(content: Content) -> tuple[float, bool]:
            out = loss(
                Slot(0, content=content),
                kept_tokens=0,
                row_bytes=1000,
                rates=Rates(),
                returns=1.0,
                can_save=True,
            )
            return out.seconds, out.save

        text = replace(replied(job_of(asking(words("What?")))), saved_tokens=0)
        pictured = replied(job_of(PROMPT, text_ids=TEXT))
        assert lost(text)[1]
        assert lost(pictured)[1], "the text before it is worth a save"
        pictured.saved_tokens = text.saved_tokens = ALL_TOKENS
        assert not lost(pictured)[1]
        behind_s = Rates().prefill_s(ALL_TOKENS - TEXT_TOKENS)
        assert lost(pictured)[0] >= behind_s > lost(text)[0]

    def test_a_shared_pool_isnt_thinned_out_by_what_no_save_brings_back(self) -> None:
        machine = replace(MACHINE, pool_tokens=20_000)
        content = replied(job_of(PROMPT, text_ids=TEXT))
        content.saved_tokens = content.tokens
        slots = [Slot(0, content=content, held_tokens=ALL_TOKENS), Slot(1)]
        slots[1].state, slots[1].job = SlotState.SERVING, "other"
        scheduler = Scheduler(slots, machine, Rates(), lambda *_: None)
        assert scheduler.tick(100.0) == []
        slots[0].content = replace(content, media_at=None)
        assert [type(effect) for effect in scheduler.tick(101.0)] == [EraseSlot]


class TestPlans:
    def demand(self, **more: Any) -> Demand:
        return replace(Demand(PROMPT, 100, can_fill=True, namespace="n"), **more)

    def chosen(self, *slots: Slot, stored: Stored | None = None, **more: Any) -> Any:
        plan = choose(self.demand(**more), slots, stored, machine=MACHINE, rates=Rates(), now_s=0.0)
        assert plan
        return plan

    def test_the_text_before_it_is_promised_and_the_same_picture_is_hoped_for(self) -> None:
        content = replied(job_of(PROMPT, text_ids=TEXT))
        plan = self.chosen(Slot(0, content=content), text_ids=TEXT)
        assert (plan.source, plan.promise_tokens) == (Source.SLOT, TEXT_TOKENS)
        assert plan.reuse_tokens > TEXT_TOKENS

    def test_another_picture_reuses_the_text_alone(self) -> None:
        content = replied(job_of(PROMPT, text_ids=TEXT))
        other = asking(words("Look at this: "), seen("B"), words("What is it?"))
        plan = self.chosen(Slot(0, content=content), text_ids=TEXT, prompt=other)
        assert (plan.reuse_tokens, plan.promise_tokens) == (TEXT_TOKENS, TEXT_TOKENS)

    def test_what_is_kept_of_the_text_is_restored(self) -> None:
        stored = Stored(-1, TEXT_TOKENS, TEXT_TOKENS, 1000 * TEXT_TOKENS, ready=True, extent_id=1)
        plan = self.chosen(Slot(0), stored=stored, text_ids=TEXT)
        assert (plan.source, plan.promise_tokens) == (Source.SNAPSHOT, TEXT_TOKENS)
        assert plan.prompt_tokens > TEXT_TOKENS

    def test_once_its_text_is_counted_nothing_is_in_doubt(self) -> None:
        machine, rates = MACHINE, Rates()
        slots = [Slot(0)]
        assert doubt_tokens(self.demand(), slots, None, machine=machine, rates=rates) > 0
        counted = self.demand(text_ids=TEXT)
        assert doubt_tokens(counted, slots, None, machine=machine, rates=rates) == 0


class _Engine:
    """Renders pictures as a marker; a token is a character."""

    def __init__(self, marker: str | None) -> None:
        self.marker = marker
        self.sent: list[Any] = []

    async def props(self) -> dict[str, Any]:
        return {"media_marker": self.marker} if self.marker else {}

    async def render(self, body: dict[str, Any]) -> str:
        self.sent.append(body)
        out = ""
        for message in body["messages"]:
            content = message["content"]
            for part in content if isinstance(content, list) else [words(content)]:
                out += part.get("text") or str(self.marker)
        return out

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return list(map(ord, text))


class TestCounting:
    def counted(self, marker: str | None, chat: dict[str, Any]) -> tuple[Any, _Engine]:
        engine = _Engine(marker)

        async def run() -> Any:
            counter = PromptCounter(engine)  # type: ignore[arg-type]
            await counter.prepare()
            return (await counter.timed(chat, has_media=True))[0]

        return asyncio.run(run()), engine

    def test_tokens_before_the_first_picture_are_counted(self) -> None:
        parts = [words("Look: "), seen("A"), words("and"), seen("B")]
        chat = {"messages": [{"role": "user", "content": parts}]}
        tokens, engine = self.counted("<__media_x1__>", chat)
        assert "".join(map(chr, tokens)) == "Look: "
        assert len(str(engine.sent[-1])) < 400, "no picture is sent to be rendered"
        assert chat["messages"][0]["content"][1] == seen("A")

    @pytest.mark.parametrize("marker", [None, ""])
    def test_an_engine_that_marks_no_pictures_counts_nothing(self, marker: str | None) -> None:
        chat = {"messages": [{"role": "user", "content": [words("Look: "), seen("A")]}]}
        assert self.counted(marker, chat)[0] is None


TOKENS = list(range(100, 160))
PICTURE = (40, 50)


class TestStore:
    def test_of_a_slot_with_a_picture_the_text_before_it_is_kept(self, tmp_path: Path) -> None:
        store = opened(settings_in(tmp_path), NoSyncDisk())
        marks = [KeptMark(bytes([at]) * 16, at) for at in (20, 40, 55)]
        file = pictured_file(TOKENS, picture=PICTURE)
        saved = save(store, TOKENS, file=file, marks=marks)
        assert (saved.at_tokens, saved.new_tokens) == (40, 40)
        assert saved.new_bytes == PLAIN.rows_bytes(40)
        assert restored(store, saved.extent_id, 40) == slot_file(TOKENS[:40], for_engine=True)
        found = store.lookup([mark.digest for mark in marks], [""])
        assert found is not None
        assert found.at_tokens == 40, "nothing says that what follows is kept"
        # Text goes on from there like any other, and another picture adds nothing.
        assert save(store, [*TOKENS[:40], 7, 8]).new_tokens == 2
        assert save(store, TOKENS, file=file).new_tokens == 0

    @pytest.mark.parametrize("layout", [HYBRID, WINDOWED], ids=["hybrid", "windowed"])
    def test_models_that_cant_be_cut_go_on_from_a_checkpoint_before_it(
        self, tmp_path: Path, layout: Layout
    ) -> None:
        store = opened(settings_in(tmp_path, layout), NoSyncDisk())
        file = pictured_file(TOKENS, layout, picture=PICTURE, ends=(56, 30, 12))
        saved = save(store, TOKENS, file=file, prefill_s=60.0)
        assert (saved.at_tokens, saved.ends) == (30, (12, 30))
        assert restored(store, saved.extent_id, 30) == slot_file(
            TOKENS[:30], layout, for_engine=True
        )

    def test_without_a_state_before_it_nothing_is_kept(self, tmp_path: Path) -> None:
        store = opened(settings_in(tmp_path, HYBRID), NoSyncDisk())
        with refused("media"):
            save(store, TOKENS, file=pictured_file(TOKENS, HYBRID, picture=PICTURE, ends=(56,)))

    def test_whole_snapshots_are_of_text_alone(self, tmp_path: Path) -> None:
        store = opened(settings_in(tmp_path, None), NoSyncDisk())
        with refused("media"):
            save(store, TOKENS, file=pictured_file(TOKENS, picture=PICTURE))
