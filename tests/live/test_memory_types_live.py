"""Each kind of model memory, through a real Keepwarm: warm means the same answer, and for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from served import Answer, Serve, Served
from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2

pytestmark = pytest.mark.live

WRITERS: dict[str, Callable[..., None]] = {"window": write_tiny_gemma3, "hybrid": write_tiny_lfm2}
SLOTS = 3
ROUNDING = 0.02  # in a logprob; ten times what was seen
# Longer than the tiny sliding-window model's window of 64 tokens.
RULES = {"role": "system", "content": "Name the disk, then the hour, then the reason why. " * 12}
QUESTION = {"role": "user", "content": "What happened in the night?"}


@pytest.fixture(params=["plain", "window", "hybrid"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = request.param
    if kind == "plain":
        return small_model()
    path = tmp_path_factory.getbasetemp() / f"{kind}.gguf"
    if not path.exists():
        WRITERS[kind](path, small_model())
    return path


def start(serve: Serve, model: Path) -> Served:
    # Slots that don't share a pool, so that what the others hold can't change the last bits.
    return serve(model=str(model), slots=SLOTS, context=1024 * SLOTS, pool="split")


def is_exact(model: Path) -> bool:
    """Whether restored is bit for bit what was in memory.

    It is for plain attention. A restored window begins at cell 0, and the engine adds up attention
    in groups of cells. A hybrid's first tokens, which every prompt begins with, are on disk once,
    and can't be gone on from there. Both differ in the last bits.
    """
    return model.stem not in WRITERS


def assert_same(first: Answer, second: Answer, *, exactly: bool) -> None:
    """The same tokens with the same logprobs, their rivals' too; or close ones, for one token."""
    if exactly:
        assert first.logprobs == second.logprobs
        return
    ours, theirs = dict(first.logprobs[0][2]), dict(second.logprobs[0][2])
    both = ours.keys() & theirs.keys()
    assert len(both) >= 3
    for token in both:
        assert ours[token] == pytest.approx(theirs[token], abs=ROUNDING)


def ask(served: Served) -> Answer:
    """Ask about the night. As one of a batch, so that nobody saves the turn behind the rules: a
    prompt that is reused to another place is computed in other portions, and so in other bits.
    """
    body = {"messages": [RULES, QUESTION], "max_tokens": 6, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 5}
    answer = served.post("/v1/chat/completions", body, X_Keepwarm_Priority="batch")
    assert answer.status == 200
    served.settled()
    return answer


def test_restored_is_as_good_as_never_gone_and_a_second_start_prefills_nothing(
    serve: Serve, model: Path
) -> None:
    served = start(serve, model)
    warmed = served.get("/keepwarm/status")["warmed"]
    assert all(w["proved"] for w in warmed)
    assert sum(w["prefilled_tokens"] for w in warmed) > 0

    # Filled to the static end and gone on from there, in memory.
    in_memory = ask(served)
    assert in_memory.plan == "cold"
    static_tokens = in_memory.cached
    assert static_tokens > 100
    # Out of the slots, and back from the store.
    served.occupy()
    restored = ask(served)
    assert restored.plan == "snapshot"
    assert restored.cached == static_tokens
    assert_same(restored, in_memory, exactly=is_exact(model))
    served.stop()

    # In another life of both.
    again = start(serve, model)
    warmed = again.get("/keepwarm/status")["warmed"]
    assert [w["how"] for w in warmed] == ["restored", "restored"]
    assert sum(w["prefilled_tokens"] for w in warmed) == 0
    assert all(w["proved"] for w in warmed)
    reborn = ask(again)
    assert reborn.plan in ("snapshot", "slot")
    assert reborn.cached == static_tokens
    assert_same(reborn, restored, exactly=is_exact(model))
    assert_same(reborn, in_memory, exactly=is_exact(model))
    misses = [li for li in again.read("/metrics").splitlines() if "keepwarm_misses_total{" in li]
    assert misses == []
    again.stop()


def test_a_conversation_is_continued_from_where_it_was(serve: Serve, model: Path) -> None:
    served = start(serve, model)
    first = ask(served)
    said = {"role": "assistant", "content": first.text}
    follow = {"role": "user", "content": "And what then?"}
    answer = served.chat(RULES, QUESTION, said, follow, max_tokens=2)
    assert answer.status == 200
    # A random model's reply may come back as other tokens; its static part is there all the same.
    assert answer.cached >= first.cached
    served.stop()


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_two_fine_tunes_of_one_shape_never_share(serve: Serve, tmp_path: Path, kind: str) -> None:
    answers = []
    for seed in (1, 2):
        # The same path, size and header: only the weights are others.
        model = tmp_path / "model.gguf"
        model.unlink(missing_ok=True)
        WRITERS[kind](model, small_model(), seed=seed)
        served = start(serve, model)
        warmed = served.get("/keepwarm/status")["warmed"]
        assert [w["how"] for w in warmed] == ["prefilled", "prefilled"]
        answers.append(ask(served).logprobs)
        served.stop()
    assert answers[0] != answers[1]
