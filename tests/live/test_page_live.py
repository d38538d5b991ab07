"""The page in a real browser over the real gateway and engine."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from browser import Page
from keepwarm.tiers.files import packaged_configs
from served import Answer, Served

pytestmark = [pytest.mark.live, pytest.mark.browser]

KEY, OTHER = "alice-key", "bob-key"
RULES = "Always answer with the name of the disk, the hour and one short reason. " * 8


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: Path, quick_model: Path
) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={
            "model": str(quick_model),
            "threads": 1,
            "slots": 2,
            "context": 4096,
            "pool": "split",
            "chat_template": str(packaged_configs() / "chat-templates" / "chatml-tools.jinja"),
        },
        server={"api_keys": [f"alice:{KEY}", f"bob:{OTHER}"], "operators": ["alice"]},
        tiers={"dir": str(small_tiers)},
        log={"prompts": True},
    ).wait_ready()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def window(served: Served) -> Iterator[Page]:
    page = Page(served.base)
    yield page
    page.close()


@pytest.fixture
def page(window: Page) -> Iterator[Page]:
    """The page with its key given, connected, at a desk's width and in light."""
    window.resize(1280, 900)
    window.prefer("light")
    window.open(KEY)
    connected(window)
    yield window
    assert window.complaints() == []


def connected(page: Page) -> None:
    page.until(lambda: page.text("#state") == "ready", "connected and ready")


def number_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return answer.headers["x-keepwarm-request-id"]


def row(page: Page, number: str) -> Any:
    return page.one(f'#rows tr[data-id="{number}"]')


def ask(served: Served, text: str, system: str = RULES, **more: Any) -> Answer:
    messages = ({"role": "system", "content": system}, {"role": "user", "content": text})
    return served.chat(*messages, **more)


def two_dates(served: Served) -> str:
    """A request that is cold because of a date; its id."""
    ask(served, "Is it there?", f"It is 2026-11-24 09:00. {RULES}")
    served.settled()
    return number_of(ask(served, "Is it there?", f"It is 2026-11-24 09:05. {RULES}"))


def test_without_its_key_the_page_holds_nothing_and_asks_for_it(
    window: Page, served: Served
) -> None:
    served.ask("Is it there?", model="standard")
    for path in ("overview", "events", "requests", "requests/last", "store"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{served.base}/keepwarm/{path}", timeout=30)
    window.open()
    field = window.one("#key")
    window.until(field.is_displayed)
    assert window.all("#rows tr") == []
    field.send_keys("wrong-key")
    window.press("\ue007")
    window.until(lambda: "isn't known" in window.text("#ask-wrong"), "the key is refused")
    field.send_keys(KEY)
    window.press("\ue007")
    connected(window)
    window.until(lambda: window.all("#rows tr"), "requests are shown")
    window.one("#forget").click()
    window.until(lambda: window.one("#ask").get_attribute("open"), "it asks again")
    window.complaints()


def test_a_request_shows_up_live_with_its_slot_and_is_counted(page: Page, served: Served) -> None:
    page.until(lambda: page.text("#t-share-of").strip(), "sums are shown")
    before = page.run("return over.totals.today.requests")
    number = number_of(served.ask("Is the disk there?", model="standard"))
    shown = row(page, number)
    assert "standard" in shown.text
    assert page.run("return over.totals.today.requests") == before + 1
    title = page.run(
        "return [...document.querySelectorAll('#lanes .hit title')].map(t => t.textContent)"
    )
    assert any(text.startswith("standard, ") for text in title)
    assert page.run("return document.querySelectorAll('#ttft circle').length") >= 2


def test_requests_of_another_key_do_not_show_up(page: Page, served: Served) -> None:
    theirs = number_of(served.ask("Is it mine?", model="minimal", key=OTHER))
    mine = number_of(served.ask("Is it mine?", model="minimal"))
    row(page, mine)
    assert page.all(f'#rows tr[data-id="{theirs}"]') == []


def test_an_explanation_is_one_key_away_and_closes_again(page: Page, served: Served) -> None:
    number = two_dates(served)
    row(page, number)
    page.run("document.querySelector(arguments[0]).focus()", f'tr[data-id="{number}"] button')
    page.press("\ue007")
    page.until(lambda: page.one("#why").get_attribute("open"), "the explanation is open")
    told = page.text("#why-in")
    assert "a date or time changed" in told
    assert "2026-11-24 09:00" in page.text("#why del")
    assert "2026-11-24 09:05" in page.text("#why ins")
    assert "taken" in told
    assert page.run("return location.hash") == f"#{number}"
    page.press("\ue00c")
    page.until(lambda: not page.one("#why").get_attribute("open"), "it is closed")
    # The address of an explanation can be passed on.
    page.driver.get(f"{page.base}/keepwarm/#{number}")
    page.driver.refresh()
    page.until(lambda: page.all("#why[open]"), "the explanation is open again")


def test_requests_can_be_walked_by_keys_and_narrowed_by_cause(page: Page, served: Served) -> None:
    number = two_dates(served)
    row(page, number)
    page.run("document.querySelector('#theme').focus()")
    page.press("j")
    first = page.run("return document.activeElement.closest('tr').dataset.id")
    page.press("j")
    assert page.run("return document.activeElement.closest('tr').dataset.id") != first
    page.press("k")
    assert page.run("return document.activeElement.closest('tr').dataset.id") == first
    page.one('#cause option[value="timestamp"]').click()
    causes = {cell.text for cell in page.all("#rows td.c")}
    assert causes == {"a date or time changed"}


def test_a_prefix_is_pinned_and_evicted_by_hand(page: Page, served: Served) -> None:
    ask(served, "Keep me or not?", f"Pin me. {RULES}")
    served.settled()
    served.until(lambda: own(served), seconds=30)
    extent = own(served)[-1]["id"]
    button = f'[data-act="pin{extent}"]'
    page.one(button).click()
    page.until(lambda: page.text(button) == "Unpin", "it is pinned")
    # By its id: a save that came meanwhile may hang off it, and then it ends no branch any more.
    (found,) = kept(served, extent)
    assert found["pins"] == ["by hand"]
    assert not page.one(f'[data-act="evict{extent}"]').is_enabled()
    page.one(button).click()
    page.until(lambda: page.text(button) == "Pin", "it is loose again")

    page.one(f'[data-act="evict{extent}"]').click()
    page.until(lambda: page.one("#sure").get_attribute("open"), "it asks first")
    page.one('#sure button[value="no"]').click()
    assert kept(served, extent)
    page.one(f'[data-act="evict{extent}"]').click()
    page.one('#sure button[value="yes"]').click()
    page.until(lambda: not page.all(button), "it is gone from the page")
    assert not kept(served, extent)


def kept(served: Served, extent: int) -> list[dict[str, Any]]:
    """One extent as it is listed now, if it is."""
    return [e for e in served.get("/keepwarm/store")["extents"] if e["id"] == extent]


def own(served: Served) -> list[dict[str, Any]]:
    """What is saved for this key alone and that nothing hangs off."""
    extents = served.get("/keepwarm/store")["extents"]
    parents = {e["parent"] for e in extents}
    return [e for e in extents if not e["is_shared"] and e["id"] not in parents]


def test_what_all_keys_share_cannot_be_changed_by_one(page: Page, served: Served) -> None:
    page.until(lambda: page.all("#tree li button"), "the tree is shown")
    shared = [e["id"] for e in served.get("/keepwarm/store")["extents"] if e["is_shared"]]
    assert shared
    for extent in shared:
        assert not page.one(f'[data-act="evict{extent}"]').is_enabled()
        answer = served.post(f"/keepwarm/store/{extent}/evict", {})
        assert answer.status == 403
    assert served.post("/keepwarm/store/999999/evict", {}).status == 404


def test_another_keys_extents_are_counted_for_an_operator(page: Page, served: Served) -> None:
    ask(served, "Mine alone?", f"For nobody else. {RULES}", key=OTHER)
    served.settled()
    mine = served.get("/keepwarm/store")
    assert mine["others"]["extents"] >= 1
    theirs = served.read("/keepwarm/store", key=OTHER)
    assert json.loads(theirs)["others"] is None, "bob is no operator"
    page.until(lambda: "of other keys" in page.text("#disk"), "they are counted")
    page.until(lambda: "another key's" in page.text("#names"), "their slot is told as theirs")


def brightness(page: Page) -> float:
    color = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    numbers = [float(n) for n in color[color.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3 / 255


def test_it_is_dark_where_the_system_is_and_a_switch_overrides(page: Page) -> None:
    assert brightness(page) > 0.8
    page.prefer("dark")
    assert brightness(page) < 0.2
    page.one("#theme").click()
    assert page.text("#theme") == "Theme: light"
    assert brightness(page) > 0.8
    page.driver.refresh()
    assert brightness(page) > 0.8
    page.one("#theme").click()
    page.prefer("light")
    assert (page.text("#theme"), brightness(page) < 0.2) == ("Theme: dark", True)
    page.one("#theme").click()
    assert (page.text("#theme"), brightness(page) > 0.8) == ("Theme: auto", True)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, served: Served, width: int) -> None:
    number = two_dates(served)
    page.resize(width, 844)
    page.driver.refresh()
    connected(page)
    shown = row(page, number)
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.run("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", shown)
    page.until(lambda: page.all("#why[open]"), "the explanation is open")
    assert page.run("return document.documentElement.scrollWidth") <= width
    box = page.run("return document.querySelector('#why').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_serious(page: Page, served: Served, scheme: str, width: int) -> None:
    number = two_dates(served)
    page.resize(width, 844)
    page.prefer(scheme)
    page.driver.refresh()
    connected(page)
    row(page, number)
    page.until(lambda: page.all("#tree li button"), "the tree is shown")
    # The mark of a row that has just come fades away first.
    page.until(lambda: page.run("return document.getAnimations().length === 0"), "it is still")
    assert page.serious_findings() == []
    page.run("openWhy(arguments[0])", number)
    page.until(lambda: page.all("#why[open]"), "the explanation is open")
    assert page.serious_findings() == []


def test_a_batch_is_shown_with_how_far_it_is(page: Page, served: Served) -> None:
    api = openai.OpenAI(base_url=f"{served.base}/v1", api_key=KEY, max_retries=0)
    messages = [{"role": "user", "content": "Which part?"}]
    body = {"model": "minimal", "messages": messages, "max_tokens": 2}
    tasks = [
        {"custom_id": f"t{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i in range(3)
    ]
    raw = "\n".join(map(json.dumps, tasks)).encode()
    file = api.files.create(file=("tasks.jsonl", raw), purpose="batch")
    batch = api.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    served.until(lambda: api.batches.retrieve(batch.id).status == "completed")
    page.driver.refresh()
    page.until(lambda: batch.id in page.text("#batch"), "the batch is listed")
    assert page.one("#batch").is_displayed()
    assert "3 of 3" in page.text("#batch")


def test_it_loads_nothing_but_itself_and_its_own_routes(page: Page) -> None:
    page.until(lambda: page.all("#tree li"), "all is loaded")
    urls = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls
    assert all(url.startswith((page.base, "data:")) for url in urls)


def test_a_second_look_shows_the_slots_though_nothing_happens(page: Page) -> None:
    page.until(lambda: page.all("#names div"), "slots are shown")
    page.driver.refresh()
    page.until(lambda: page.all("#names div"), "slots are shown again")


def test_it_finds_its_way_back_after_the_gateway_was_away(page: Page, served: Served) -> None:
    page.run("stream.abort()")
    page.until(lambda: page.text("#state") == "not connected", "it says so")
    connected(page)
    row(page, number_of(served.ask("Are you back?", model="minimal")))
