"""Make the pictures in docs/images/: a real Keepwarm at work, its page in a real browser.

    python scripts/screenshots.py [--model FILE] [--output DIR]

Needs Debian's chromium and chromium-driver, and selenium (`pip install 'keepwarm[browser]'`).
Serves the model with the packaged tiers, sends it an evening's worth of an agent's requests, and
takes the page in light, in dark and on a phone, an explanation, and `keepwarm top`. About two
minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from keepwarm.cli.explain import story
from keepwarm.cli.top import Screen, screen
from keepwarm.engine.process import free_port

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = ROOT / "configs" / "chat-templates" / "chatml-tools.jinja"
READY_S = 300.0
RULES = (
    "You review changes to a small web shop before they are merged. Name the file and the line, "
    "say what breaks and for whom, and propose one change at a time. "
) * 6
CHANGES = (
    "The basket forgets its voucher after a login.",
    "Prices are rounded before the tax is added.",
    "A mail is sent twice when the queue restarts.",
)


class Shop:
    """The agent's requests to one gateway."""

    def __init__(self, base: str) -> None:
        self._base = base

    def chat(self, *messages: dict[str, str], **body: Any) -> str:
        """Ask, and give back what was said."""
        asked = {"messages": list(messages), "max_tokens": 24, "temperature": 0, **body}
        request = urllib.request.Request(  # noqa: S310 - the gateway that was just started
            f"{self._base}/v1/chat/completions",
            json.dumps(asked | {"stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        said = ""
        with urllib.request.urlopen(request, timeout=READY_S) as reply:  # noqa: S310 - as above
            for line in reply:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    said += choices[0].get("delta", {}).get("content") or ""
        return said

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object of the gateway's own."""
        url = f"{self._base}{path}"
        with urllib.request.urlopen(url, timeout=30) as reply:  # noqa: S310 - as above
            return dict(json.loads(reply.read()))

    def work(self) -> None:
        """An evening: tiers, a review that goes on, a stampede, and two habits that cost warmth."""
        for tier, text in (
            ("standard", "Which of my notes mention the backup?"),
            ("minimal", "Reply with one word: is 7 a prime?"),
            ("full", "Plan the move of the photo archive to the new disk."),
            ("standard", "Remind me to call the plumber."),
            ("auto", "What is 12 times 12?"),
        ):
            self.chat(user(text), model=tier)
        turns = [system(RULES), user(f"Review this: {CHANGES[0]}")]
        for text in ("Which test would have caught it?", "Write that test.", "Shorter."):
            turns.append({"role": "assistant", "content": self.chat(*turns)})
            turns.append(user(text))
        self.chat(*turns)
        for hour in ("20:14:07", "20:15:31"):
            self.chat(system(f"It is 2026-11-24 {hour}. {RULES}"), user(f"Review: {CHANGES[1]}"))
        fresh = f"You write release notes. {RULES}"
        with ThreadPoolExecutor(4) as pool:
            asks = [(system(fresh), user(f"Note {i}: {CHANGES[i % 3]}")) for i in range(4)]
            list(pool.map(lambda messages: self.chat(*messages), asks))
        tools = [tool("read_file"), tool("run_tests"), tool("open_issue")]
        self.chat(system(RULES), user(f"Check: {CHANGES[2]}"), tools=tools)
        self.chat(system(RULES), user(f"Check: {CHANGES[2]}"), tools=[tools[0], tools[2]])
        for text in ("What changed since Monday?", "And what is left to do?"):
            self.chat(user(text), model="standard")
        turns.append({"role": "assistant", "content": "Done."})
        self.chat(*turns, user("And which voucher was it?"))


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    """A client's own system message."""
    return {"role": "system", "content": text}


def tool(name: str) -> dict[str, Any]:
    """A tool of the client's."""
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    description = f"{name.replace('_', ' ').capitalize()} of the shop's repository."
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


@contextmanager
def served(model: Path, scratch: Path) -> Iterator[str]:
    """A Keepwarm with the packaged tiers, which keeps text for its explanations."""
    port = free_port()
    (scratch / "keepwarm.toml").write_text(
        f'[engine]\nmodel = "{model}"\nchat_template = "{TEMPLATE}"\n[server]\nport = {port}\n'
        f'[store]\ndir = "{scratch / "store"}"\n[log]\nprompts = true\n'
    )
    log = scratch / "serve.log"
    command = [sys.executable, "-m", "keepwarm", "serve", "--config"]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, str(scratch / "keepwarm.toml")], stdout=sink, stderr=sink
        )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_S
        while not is_ready(base):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"keepwarm didn't come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.3)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_ready(base: str) -> bool:
    """Whether all tiers are warm."""
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5):  # noqa: S310 - as above
            return True
    except OSError:
        return False


class Camera:
    """A browser window that takes pictures."""

    def __init__(self, base: str, output: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not chromium or not driver:
            raise SystemExit("Install a browser: apt-get install chromium chromium-driver")
        try:
            from selenium import webdriver  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise SystemExit("Install selenium: pip install 'keepwarm[browser]'") from error
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ):
            options.add_argument(argument)
        self.driver: Any = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(driver)
        )
        self._base, self._output = base, output

    def close(self) -> None:
        """Close the window."""
        self.driver.quit()

    def show(self, *, width: int, dark: bool = False, fragment: str = "") -> None:
        """Load the page anew, all of it connected and drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._size(width, 1000)
        self.driver.get("about:blank")
        self.driver.get(f"{self._base}/keepwarm/{fragment}")
        deadline = time.monotonic() + 30
        ready = "return requests.length > 0 && tree !== null && now !== null"
        while not self.driver.execute_script(ready) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.driver.execute_script("document.querySelector('[data-s=\"60\"]').click()")
        time.sleep(2.0)

    def take(self, name: str, *, width: int, height: int) -> None:
        """Write a picture of the page's top."""
        self._size(width, height)
        time.sleep(0.7)
        self.driver.save_screenshot(str(self._output / name))
        print(self._output / name)

    def _size(self, width: int, height: int) -> None:
        mobile = width < 700
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1.5 if mobile else 1,
            mobile=mobile,
        )

    def _send(self, command: str, **parameters: Any) -> None:
        self.driver.execute_cdp_cmd(command, parameters)


def picture_terminal(shop: Shop, output: Path) -> None:
    """`keepwarm top` and `keepwarm explain` as they look in a terminal."""
    records = shop.get("/keepwarm/requests?limit=100")["requests"]
    seen = Screen(shop.get("/keepwarm/overview"), shop.get("/keepwarm/slots"))
    seen.requests.extend(records)
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    console.print(screen(seen, now_s=time.time(), width=112, height=34))
    save_svg(console, output / "top.svg", "keepwarm top")
    dated = next(r["id"] for r in records if r["cause"] == "timestamp")
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    console.print(story(shop.get(f"/keepwarm/requests/{dated}")))
    save_svg(console, output / "explain.svg", "keepwarm explain")
    print(output / "top.svg", output / "explain.svg", sep="\n")


def save_svg(console: Console, path: Path, title: str) -> None:
    """What was printed as a picture, with the reader's own fonts instead of fetched ones."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)
    path.write_text(svg.replace("Fira Code", "ui-monospace"), encoding="utf-8")


def main() -> None:
    """Serve, work, take pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-pictures-") as scratch,
        served(arguments.model.resolve(), Path(scratch)) as base,
    ):
        shop = Shop(base)
        shop.work()
        take_all(shop, Camera(base, arguments.output))
        picture_terminal(shop, arguments.output)


def take_all(shop: Shop, camera: Camera) -> None:
    """The page in its ways, and one explanation."""
    try:
        camera.show(width=1200)
        camera.take("page.png", width=1200, height=1500)
        camera.show(width=1200, dark=True)
        camera.take("page-dark.png", width=1200, height=1000)
        camera.show(width=390)
        camera.take("page-phone.png", width=390, height=1400)
        records = shop.get("/keepwarm/requests?limit=100")["requests"]
        dated = next(r["id"] for r in records if r["cause"] == "timestamp")
        camera.show(width=1000, fragment=f"#{dated}")
        camera.take("explanation.png", width=1000, height=960)
    finally:
        camera.close()


if __name__ == "__main__":
    main()
