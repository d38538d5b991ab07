"""A real browser for a test: Debian's chromium, driven over its own protocol."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 60.0


class Page:
    """One browser window on a Keepwarm's page."""

    def __init__(self, base: str) -> None:
        """Open a window; the test is skipped where there is no chromium."""
        self.base = base
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not chromium or not driver:
            pytest.skip("no chromium here (apt-get install chromium chromium-driver)")
        webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(driver)
        self.driver: Any = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(WAIT_S)
        self.resize(1280, 900)

    def close(self) -> None:
        self.driver.quit()

    def resize(self, width: int, height: int) -> None:
        """Show the page as on a screen of this size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """What the system asks for: `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, key: str | None = None) -> Page:
        """Load the page; with a key, as someone who gave it before."""
        self.driver.get(f"{self.base}/health")  # of the same origin, and in need of no key
        self.run("sessionStorage.clear(); localStorage.clear()")
        if key is not None:
            self.run("sessionStorage.setItem('keepwarm-key', arguments[0])", key)
        self.complaints()  # a browser asks that address for an icon
        self.driver.get(f"{self.base}/keepwarm/")
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        """The element, as soon as it is there."""
        self.until(lambda: self.all(selector), f"{selector} is there")
        return self.all(selector)[0]

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent", selector))

    def until(self, condition: Callable[[], Any], what: str = "that") -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"it never came to this: {what}\n{self.complaints()}")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Keys on whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def complaints(self) -> list[str]:
        """What the browser found wrong since the last time."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def serious_findings(self) -> list[str]:
        """What axe-core calls serious or critical; the test is skipped where there is no axe."""
        self.run(axe_source())
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then(done, e => done(String(e)))"
        )
        assert isinstance(found, dict), found
        return [
            f"{v['id']}: {v['help']}: {json.dumps([n['html'][:200] for n in v['nodes'][:3]])}"
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]


def axe_source() -> str:
    """axe-core's script, from a package that carries it or from KEEPWARM_TEST_AXE."""
    named = os.environ.get("KEEPWARM_TEST_AXE")
    if named:
        return Path(named).read_text(encoding="utf-8")
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            file = Path(place) / "axe.min.js"
            if file.is_file():
                return file.read_text(encoding="utf-8")
    pytest.skip("no axe-core here (pip install axe-core-python)")
