"""Fixtures of the live tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bareengine import BareEngine, StartEngine, end_engine, start_engine


@pytest.fixture(scope="module")
def bare_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngine]:
    """Starts the real engine: `bare_engine(model, n_ctx=1024)`.

    Only one runs at a time: starting the next, and leaving the module, ends it.
    """
    running: list[BareEngine] = []

    def start(model: Path, **params: Any) -> BareEngine:
        stop()
        engine = start_engine(model, tmp_path_factory.mktemp("slots"), params)
        running.append(engine)
        return engine

    def stop() -> None:
        while running:
            end_engine(running.pop())

    yield start
    stop()
