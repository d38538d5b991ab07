"""What is remembered of requests: recent prompts in memory, records on disk, each to its own."""

from __future__ import annotations

import sqlite3
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.prompt import prompt_of
from keepwarm.explain.history import History, PastRequest, Totals, forget_requests
from keepwarm.explain.parts import Parts, parts_of
from keepwarm.explain.recent import Recent, Remembered
from keepwarm.explain.record import without_text

SYSTEM = "You look after a house. " + "Be brief and name what you saw. " * 40


def body(*texts: str, system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *turns], **more}


def remembered(name: str, asked: dict[str, Any], namespace: str = "ada") -> Remembered:
    prompt = prompt_of(asked, fingerprint="f", namespace=namespace)
    digests = frozenset(mark.digest for mark in prompt.marks)
    return Remembered(name, namespace, parts_of(asked), digests, 0.0)


def nearest(
    recent: Recent, asked: dict[str, Any], namespace: str = "ada", before_s: float = 1.0
) -> str | None:
    prompt = prompt_of(asked, fingerprint="f", namespace=namespace)
    marks = [mark.digest for mark in prompt.marks]
    found = recent.nearest(marks, parts_of(asked), namespace=namespace, before_s=before_s)
    return found.id if found else None


def holding(*prompts: Remembered, **bounds: int) -> Recent:
    recent = Recent(**bounds)
    for prompt in prompts:
        recent.add(prompt)
    return recent


# --- the nearest of the recent prompts


def test_the_prompt_with_the_longest_common_beginning_is_the_nearest() -> None:
    recent = holding(
        remembered("first turn", body("Where is the cat?")),
        remembered("second turn", body("Where is the cat?", "On the roof.", "Still?")),
        remembered("other", body("Is the door shut?")),
    )
    asked = body("Where is the cat?", "On the roof.", "Still?", "Yes.", "And now?")
    assert nearest(recent, asked) == "second turn"


def test_of_prompts_that_part_at_one_place_the_most_alike_is_the_nearest() -> None:
    note = "Summarise: " + "the cat sat here. " * 10
    recent = holding(
        remembered("same note", body("09:00 " + note)),
        remembered("latest", body("Is the door shut?")),
    )
    assert nearest(recent, body("09:05 " + note)) == "same note"


def test_a_prompt_that_differs_in_its_first_line_is_found_all_the_same() -> None:
    recent = holding(remembered("one", body("x", system="It is 09:00. " + SYSTEM)))
    assert nearest(recent, body("x", system="It is 09:01. " + SYSTEM)) == "one"


def test_a_prompt_with_other_tools_is_found_by_what_it_shares() -> None:
    tool = {"type": "function", "function": {"name": "read", "description": "Reads. " * 9}}
    recent = holding(remembered("one", body("x", tools=[tool])))
    assert nearest(recent, body("x")) == "one"
    assert nearest(recent, body("y", system="Another text.", tools=[tool])) == "one"


def test_prompts_that_have_nothing_in_common_are_not_near() -> None:
    recent = holding(remembered("one", body("Where is the cat?")))
    assert nearest(recent, body("Translate this.", system="Vous êtes un traducteur.")) is None
    assert nearest(Recent(), body("x")) is None


def test_prompts_of_another_namespace_are_never_compared() -> None:
    recent = holding(remembered("ada's", body("Where is the cat?"), "ada"))
    assert nearest(recent, body("Where is the cat?"), "bob") is None


def test_what_was_answered_after_a_prompt_arrived_was_not_there_for_it() -> None:
    early = replace(remembered("early", body("Is the door shut?")), ended_s=3.0)
    late = replace(remembered("late", body("Where is the cat?")), ended_s=7.0)
    recent = holding(early, late)
    asked = body("Where is the cat?", "On the roof.", "Still?")
    assert nearest(recent, asked, before_s=5.0) == "early"
    assert nearest(recent, asked, before_s=7.0) == "late"
    assert nearest(recent, asked, before_s=2.0) is None


def test_tiers_are_compared_with_everyones_prompts() -> None:
    recent = Recent()
    recent.share([remembered("tier:small", body())])
    assert nearest(recent, body("Hello"), "bob") == "tier:small"
    recent.share([remembered("tier:other", body(system="Quite another text, and long enough."))])
    assert nearest(recent, body("Hello"), "bob") is None
    assert len(recent) == 1


def test_only_so_many_prompts_of_a_namespace_are_remembered() -> None:
    recent = holding(
        *(remembered(str(i), body(f"question {i}"), "ada") for i in range(9)), prompts=4
    )
    assert len(recent) == 4
    assert nearest(recent, body("question 8", "x", "y")) == "8"
    assert nearest(recent, body("question 0", "x", "y")) != "0"


def test_memory_is_bounded_over_all_namespaces() -> None:
    recent = Recent(chars=20_000)
    for i in range(200):
        recent.add(remembered(str(i), body("x" * 1000, system=f"{i} " * 200), f"key {i % 7}"))
    assert recent.chars <= 20_000
    assert recent.chars == sum(
        len(r.parts.segments[0].text) + len(r.parts.segments[1].text)
        for shelf in recent._shelves.values()
        for r in shelf.prompts
    )


def test_a_prompt_larger_than_the_bound_is_still_compared_with_the_next() -> None:
    recent = holding(remembered("huge", body("x" * 5000)), chars=1000)
    assert nearest(recent, body("x" * 5000, "a", "b")) == "huge"


def test_the_oldest_namespace_is_forgotten_when_there_are_too_many() -> None:
    recent = Recent()
    for i in range(100):
        recent.add(remembered(str(i), body("Where is the cat?"), f"key {i}"))
    assert len(recent) == 64
    assert nearest(recent, body("Where is the cat?"), "key 0") is None
    assert nearest(recent, body("Where is the cat?"), "key 99") == "99"


def test_what_a_prompt_repeats_is_kept_once() -> None:
    first = remembered("1", body("Where is the cat?"))
    second = remembered("2", body("Where is the cat?", "On the roof.", "Still?"))
    recent = holding(first)
    recent.add(second, like=first)
    kept = recent._shelves["ada"].prompts[-1].parts
    assert kept == second.parts
    assert kept.segments[0] is first.parts.segments[0]
    assert kept.sent[0] is first.parts.sent[0]


def test_calls_are_kept_as_they_were_sent() -> None:
    def parts(arguments: str) -> Parts:
        function = {"name": "read", "arguments": arguments}
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        return parts_of({"messages": [{"role": "user", "content": "x"}, call]})

    first = Remembered("1", "ada", parts('{"a": 1, "b": 2}'), frozenset(), 0.0)
    second = Remembered("2", "ada", parts('{"b": 2, "a": 1}'), frozenset(), 0.0)
    recent = holding(first)
    recent.add(second, like=first)
    assert recent._shelves["ada"].prompts[-1].parts.sent == second.parts.sent


# --- records on disk


def entry(number: int, namespace: str = "ada", **changes: Any) -> PastRequest:
    values: dict[str, Any] = {
        "id": f"request{number:05}",
        "namespace": namespace,
        "at_s": 1000.0 + number,
        "day": "2026-11-24",
        "cause": "new_text",
        "plan": "slot",
        "fingerprint": "f",
        "opening": b"o",
        "has_text": False,
        "record": {
            "id": f"request{number:05}",
            "number": number,
            "timing": {"total_s": 0.8},
        },
        "warm_tokens": 90,
        "cold_tokens": 10,
        "decoded_tokens": 5,
        "spared_s": 0.5,
    }
    return PastRequest(**(values | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.sqlite3"


def test_a_record_is_found_by_its_id_by_its_owner_alone(path: Path) -> None:
    history = History(path, keeps_text=False)
    history.add(entry(1, "ada"))
    assert history.get("request00001", namespace="ada") == entry(1).record
    assert history.get("request00001", namespace="bob") is None
    assert history.get("request00002", namespace="ada") is None
    assert history.latest(namespace="bob", limit=9) == []


def test_the_beginning_of_an_id_is_enough_if_it_is_the_only_one(path: Path) -> None:
    history = History(path, keeps_text=False)
    history.add(entry(1, id="aaaaaa1111"))
    history.add(entry(2, id="aaaaaa2222"))
    history.add(entry(3, "bob", id="aaaaaa1177"))
    assert history.get("aaaaaa11", namespace="ada") == entry(1).record
    assert history.get("aaaaaa", namespace="ada") is None
    assert history.get("aaa", namespace="ada") is None
    assert history.get("aaaaa%", namespace="ada") is None


def test_the_latest_come_first_and_can_be_narrowed(path: Path) -> None:
    history = History(path, keeps_text=False)
    for i in range(6):
        history.add(entry(i, cause="evicted" if i % 2 else "new_text"))

    def numbers(**narrow: Any) -> list[int]:
        return [r["number"] for r in history.latest(namespace="ada", **narrow)]

    assert numbers(limit=3) == [5, 4, 3]
    assert numbers(limit=9, cause="evicted") == [5, 3, 1]
    assert numbers(limit=9, before_s=1002.0) == [1, 0]


def test_only_so_many_are_kept_and_the_sums_go_on(path: Path) -> None:
    history = History(path, keeps_text=False, keep=300)
    for i in range(1000):
        history.add(entry(i))
    kept = history.latest(namespace="ada", limit=5000)
    assert 300 <= len(kept) <= 300 + 256
    assert kept[0]["number"] == 999
    assert history.totals(namespace="ada") == Totals(1000, 90_000, 10_000, 5_000, 500.0)


def test_sums_are_by_day_and_namespace_and_outlive_the_process(path: Path) -> None:
    history = History(path, keeps_text=False)
    history.add(entry(1))
    history.add(entry(2, day="2026-11-23"))
    history.add(entry(3, "bob"))
    history.close()
    again = History(path, keeps_text=False)
    assert again.totals(namespace="ada", day="2026-11-24").requests == 1
    assert again.totals(namespace="ada").requests == 2
    assert again.totals(namespace="carol") == Totals()
    assert again.knows("bob")
    assert not again.knows("carol")


def test_the_fingerprint_that_an_opening_was_last_asked_under_is_known(path: Path) -> None:
    history = History(path, keeps_text=False)
    history.describe("old", {"engine build": "1"})
    history.add(entry(1, fingerprint="old"))
    later = 2000.0
    assert history.last_opened(b"o", namespace="ada", before_s=later) == ("old", 1001.0)
    assert history.last_opened(b"o", namespace="ada", before_s=1001.5) is None  # not over yet
    assert history.last_opened(b"other", namespace="ada", before_s=later) is None
    assert history.last_opened(b"o", namespace="bob", before_s=later) is None
    assert history.described("old") == {"engine build": "1"}
    assert history.described("never") == {}


def test_its_files_are_private(path: Path) -> None:
    history = History(path, keeps_text=False)
    history.add(entry(1))
    files = list(path.parent.iterdir())
    assert len(files) >= 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def with_text(number: int) -> PastRequest:
    difference = {"cause": "timestamp", "context": "is ", "before": "SECRET", "after": "NEWER"}
    record = {"id": f"request{number:05}", "difference": difference}
    return entry(number, has_text=True, record=record)


def test_text_is_taken_out_again_once_the_settings_forbid_it(path: Path) -> None:
    history = History(path, keeps_text=True, without_text=without_text)
    history.add(with_text(1))
    history.close()
    kept = History(path, keeps_text=True, without_text=without_text)
    record = kept.get("request00001", namespace="ada")
    assert record is not None
    assert record["difference"]["before"] == "SECRET"
    kept.close()
    bare = History(path, keeps_text=False, without_text=without_text)
    record = bare.get("request00001", namespace="ada")
    assert record is not None
    assert record["difference"]["before"] is None
    assert record["difference"]["cause"] == "timestamp"
    for file in path.parent.iterdir():
        assert b"SECRET" not in file.read_bytes()


def test_a_file_of_ours_that_is_damaged_is_set_aside(path: Path) -> None:
    History(path, keeps_text=False).close()
    raw = bytearray(path.read_bytes())
    raw[100:108] = b"\xff" * 8
    path.write_bytes(raw)
    history = History(path, keeps_text=False)
    history.add(entry(1))
    assert history.get("request00001", namespace="ada") is not None
    history.close()
    (aside,) = [p for p in path.parent.iterdir() if "unreadable" in p.name]
    assert aside.read_bytes() == raw
    assert History(path, keeps_text=False).get("request00001", namespace="ada") is not None


def somebodys(path: Path, what: str) -> None:
    if what == "text":
        path.write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    elif what == "database":
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE web_requests (url TEXT)")
        db.commit()
        db.close()
    else:
        History(path, keeps_text=False).close()
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 99")
        db.commit()
        db.close()
    path.chmod(0o644)


@pytest.mark.parametrize("what", ["text", "database", "newer"])
def test_what_isnt_ours_and_what_a_newer_one_wrote_is_left_alone(path: Path, what: str) -> None:
    somebodys(path, what)
    before = path.read_bytes()
    history = History(path, keeps_text=False)
    history.add(entry(1))
    assert history.totals(namespace="ada").requests == 1
    history.close()
    assert forget_requests(path, "ada") is None
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if what != "newer":
        assert path.stat().st_mode & 0o777 == 0o644


def test_without_a_directory_to_write_to_requests_are_remembered_in_memory(
    tmp_path: Path,
) -> None:
    history = History(tmp_path / "missing" / "requests.sqlite3", keeps_text=False)
    history.add(entry(1))
    assert history.get("request00001", namespace="ada") is not None


def test_two_deployments_may_share_a_file(path: Path) -> None:
    first, second = History(path, keeps_text=False), History(path, keeps_text=False)
    first.add(entry(1))
    second.add(entry(2))
    second.write()
    assert first.salt == second.salt
    assert first.totals(namespace="ada").requests == 2
    assert second.get("request00001", namespace="ada") is not None


def test_a_write_that_fails_costs_one_record_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(path, keeps_text=False)
    other = sqlite3.connect(path)
    other.execute("DROP TABLE requests")
    other.commit()
    with caplog.at_level("WARNING", "keepwarm"):
        history.add(entry(1))
        history.add(entry(2))
    assert history.latest(namespace="ada", limit=9) == []
    assert len([r for r in caplog.records if "history" in r.getMessage()]) == 1
