"""Shared ends: marks where prompts part, prefixes filled for their own sake, tails let go."""

from __future__ import annotations

from typing import Any

import pytest

from batchsamples import document
from keepwarm.api.steering import SystemPlaces
from keepwarm.core.effects import (
    Effect,
    FilledSlot,
    FillSlot,
    RestoreSlot,
    SavedSlot,
    SaveSlot,
    Start,
)
from keepwarm.core.hints import format_ends, parse_ends, parse_priority
from keepwarm.core.hygiene import hygiene_of
from keepwarm.core.plan import Machine, Source, Stored
from keepwarm.core.prompt import Prompt, SharedEnd, prefix_of, prompt_of, segments_of
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.scheduler import SAVE_AFTER_IDLE_S, Job, Scheduler
from keepwarm.core.slots import Slot
from keepwarm.errors import RequestError
from keepwarm.gateway.client_request import ClientRequest, asked_of
from keepwarm.tiers.tiering import TieredRequest

SHARED = document(1)
TIER = {"role": "system", "content": "You keep a house in order. " * 20}
END = SharedEnd(1, len(SHARED.rstrip()))


def body(question: str) -> dict[str, Any]:
    return {"messages": [TIER, {"role": "user", "content": SHARED + question}]}


def prompt(question: str, *, ends: tuple[SharedEnd, ...] = (END,)) -> Prompt:
    return prompt_of(body(question), fingerprint="f", namespace="n", shared_segments=1, ends=ends)


def marks(of: Prompt) -> set[bytes]:
    return {mark.digest for mark in of.marks}


def test_an_end_is_a_mark_of_all_who_share_it_and_changes_no_other() -> None:
    one, other = prompt("What is first?"), prompt("Who was late?")
    plain = prompt("What is first?", ends=())
    assert marks(plain) < marks(one)
    (added,) = marks(one) - marks(plain)
    assert added in marks(other)
    assert added not in marks(prompt_of(body("x"), fingerprint="f", namespace="m"))


def test_a_prefix_ends_at_its_end_and_is_all_static() -> None:
    whole = prompt("What is first?")
    part = prefix_of(whole, segments_of(body("What is first?")), END)
    assert part.static == part.marks[-1]
    assert part.marks == whole.marks[: len(part.marks)]
    assert part.marks[-1].chars == whole.marks[0].chars + len(TIER["content"]) + 16 + END.chars
    assert not part.is_static_shared
    before = prefix_of(whole, segments_of(body("x")), SharedEnd(1, 0))
    assert before.static == whole.static
    assert before.is_static_shared


def test_a_raw_prompts_end_is_counted_from_its_first_character() -> None:
    raw = prompt_of(
        {"prompt": SHARED},
        fingerprint="f",
        namespace="n",
        ends=[SharedEnd(0, 300)],
    )
    assert prefix_of(raw, [], SharedEnd(0, 300)).marks[-1].chars == 300


@pytest.mark.parametrize(
    "text", ["1", "a:2", "1:-2", "1:2:3", "1:2,", "²:1", ", ".join(["1:2"] * 17), "9" * 50 + ":1"]
)
def test_a_header_that_names_no_places_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_ends(text)


def test_headers_are_read_as_they_are_written() -> None:
    ends = [SharedEnd(2, 0), SharedEnd(0, 3584)]
    assert parse_ends(format_ends(ends)) == sorted(ends)
    assert parse_ends(" ") == []
    assert len(parse_ends(format_ends([SharedEnd(0, n) for n in range(50)]))) == 16
    assert (parse_priority(""), parse_priority("Batch")) == (0, 1)
    with pytest.raises(RequestError):
        parse_priority("urgent")


def test_places_are_the_senders_own_whatever_a_tier_puts_before_them() -> None:
    sent = {"messages": [{"role": "user", "content": SHARED}]}
    headers = {"X-Keepwarm-Shared": "0:40"}
    asked = ClientRequest("chat", sent, "n", "/v1/chat/completions", headers)
    composed = {"messages": [TIER, TIER, *sent["messages"]]}
    assert asked.ends(TieredRequest(composed, None, "x")) == [SharedEnd(2, 40)]
    beyond = ClientRequest("chat", sent, "n", "/", {"X-Keepwarm-Shared": "1:1"})
    with pytest.raises(RequestError):
        beyond.ends(TieredRequest(composed, None, "x"))


def test_hygiene_keeps_the_text_whose_characters_a_planner_has_counted() -> None:
    hygiene = hygiene_of(["sort-tools", "move-volatile"], ())
    sent = {
        "messages": [
            {"role": "system", "content": f"It is 10:22 now.\n{SHARED}"},
            {"role": "user", "content": "Go on."},
        ],
        "tools": [{"name": "b"}, {"name": "a"}],
    }

    def rewrites(**headers: str) -> dict[str, int]:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return dict(
            asked_of(ClientRequest("chat", sent, "n", "/", named), hygiene, SystemPlaces()).rewrites
        )

    both = {"sort-tools": 2, "move-volatile": 1}
    assert rewrites() == rewrites(X_Keepwarm_Priority="interactive") == both
    assert rewrites(x_keepwarm_priority="Batch") == {"sort-tools": 2}
    assert rewrites(X_Keepwarm_Shared="0:40") == {"sort-tools": 2}
    plain = ClientRequest("completion", sent, "n", "/", {})
    assert asked_of(plain, hygiene, SystemPlaces()) is plain


class Desk:
    """A scheduler, and the steps it has asked for."""

    def __init__(self, slots: int = 2) -> None:
        self.stored: Stored | None = None
        self.scheduler = Scheduler(
            slots=[Slot(i) for i in range(slots)],
            machine=Machine(row_bytes=1000, cuttable=True, can_save=True, pool_tokens=None),
            rates=Rates(),
            lookup=lambda *_: self.stored,
        )
        self.now_s = 100.0

    def submit(self, job: Job) -> list[Effect]:
        return self.scheduler.submit(job, self.now_s)

    def fill(self, effects: list[Effect], tokens: int) -> list[Effect]:
        """Carry a fill and its save out; what follows."""
        (step,) = effects
        assert isinstance(step, FillSlot)
        (save,) = self.scheduler.step_done(step, FilledSlot(tokens), self.now_s)
        assert isinstance(save, SaveSlot)
        return self.scheduler.step_done(save, SavedSlot("file", tokens, 400_000), self.now_s)

    def end(self, job: Job, *, prompt_tokens: int = 400) -> list[Effect]:
        counts = Counts(cached=prompt_tokens - 20, prefilled=20, decoded=5)
        return self.scheduler.finished(job.id, self.now_s, counts=counts, reply=None)


def job(name: str, of: Prompt, **more: Any) -> Job:
    return Job(name, "n", of, arrived_s=0.0, deadline_s=1e9, **more)


def warming(name: str = "warm") -> Job:
    whole = prompt("What is first?")
    part = prefix_of(whole, segments_of(body("What is first?")), END)
    return job(name, part, priority=1, can_fill=True, must_save=True, static_tokens=380)


def test_a_filled_prefix_is_restored_by_others_while_it_is_still_on_its_way() -> None:
    desk = Desk()
    warm = warming()
    (start,) = desk.fill(desk.submit(warm), 380)
    assert isinstance(start, Start)
    # Another begins before the store has taken the file in: its static end is another mark.
    sibling = job("sibling", prompt("Who was late?"), static_tokens=130)
    (restore,) = desk.submit(sibling)
    assert isinstance(restore, RestoreSlot)
    assert restore.stored.staged_name == "file"
    assert sibling.plan is not None
    assert (sibling.plan.source, sibling.plan.promise_tokens) == (Source.SNAPSHOT, 380)


def test_what_only_a_slot_holds_is_saved_for_the_others() -> None:
    desk = Desk(slots=1)
    before = job("before", prompt("What is first?"), is_final=True)
    desk.submit(before)
    desk.end(before)
    warm = warming()
    (save,) = [e for e in desk.submit(warm) if isinstance(e, FillSlot)]
    assert save.job == "warm"


def test_what_the_store_has_is_not_filled_again() -> None:
    desk = Desk()
    part = warming().prompt
    desk.stored = Stored(len(part.marks) - 1, 380, 380, 380_000, ready=True, extent_id=1)
    (step,) = desk.submit(warming())
    assert isinstance(step, RestoreSlot)


@pytest.mark.parametrize("is_final", [True, False])
def test_the_tail_of_a_batch_isnt_saved_and_that_of_a_talk_is(is_final: bool) -> None:
    desk = Desk(slots=1)
    first = job("first", prompt("What is first?"), is_final=is_final)
    desk.submit(first)
    effects = desk.end(first, prompt_tokens=4000)
    desk.now_s += SAVE_AFTER_IDLE_S + 1
    effects += desk.scheduler.tick(desk.now_s)
    assert any(isinstance(e, SaveSlot) for e in effects) is not is_final


def test_a_task_gets_its_slot_after_everyone_interactive() -> None:
    desk = Desk(slots=1)
    running = job("running", prompt("1?"))
    desk.submit(running)
    desk.submit(job("task", prompt("2?"), priority=1))
    desk.submit(job("talk", prompt("3?")))
    desk.end(running)
    assert desk.scheduler.slots[0].job == "talk"
