"""Fixtures of the live tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bareengine import BareEngine, StartEngine, end_engine, start_engine
from served import Serve, Served
from smalltiers import write_small_tiers
from tinymodels import small_model, write_tiny_qwen3


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


@pytest.fixture(scope="session")
def small_tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two small tiers."""
    return write_small_tiers(tmp_path_factory.mktemp("tiers"))


@pytest.fixture(scope="session")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose words mean nothing: what is warm doesn't depend on them."""
    model = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen3(model, small_model())
    return model


@pytest.fixture
def serve(tmp_path: Path, small_tiers: Path) -> Iterator[Serve]:
    """Starts `keepwarm serve` and waits until it is ready: `serve(model=..., slots=2)`.

    Named values are of the engine's section, dictionaries are whole sections. Each start of a test
    has the same store. What still runs at its end is killed.
    """
    running: list[Served] = []

    def start(*, wait: bool = True, **values: Any) -> Served:
        sections = {k: v for k, v in values.items() if isinstance(v, dict)}
        engine = {k: v for k, v in values.items() if not isinstance(v, dict)}
        tiers = {"dir": str(small_tiers), **sections.pop("tiers", {})}
        served = Served(tmp_path / "keepwarm", engine=engine, tiers=tiers, **sections)
        running.append(served)
        return served.wait_ready() if wait else served

    yield start
    for served in running:
        served.process.kill()
        served.process.wait()
