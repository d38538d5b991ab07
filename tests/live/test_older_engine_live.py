"""A binary that is older than some of our flags, or was forked before they came."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from keepwarm.deployment.condition import State
from keepwarm.deployment.life import Life
from keepwarm.errors import EngineStartError
from keepwarm.settings import EngineSettings, Places, Settings, StoreSettings, TierSettings

pytestmark = pytest.mark.live

STAND_IN = Path(__file__).parent / "llama_server_stand_in.py"


def older_binary(path: Path, *unknown: str) -> Path:
    """The real engine, but for some arguments: it refuses them in llama.cpp's words."""
    path.write_text(
        textwrap.dedent(f"""\
            #!{sys.executable}
            import os, sys
            for word in sys.argv[1:]:
                if word in {unknown!r}:
                    sys.exit("error: invalid argument: " + word)
            os.execv(sys.executable, [sys.executable, {str(STAND_IN)!r}, *sys.argv[1:]])
            """)
    )
    path.chmod(0o700)
    return path


def settings_of(tmp_path: Path, tiers: Path, model: Path, binary: Path, *extra: str) -> Settings:
    return Settings(
        engine=EngineSettings(
            model=str(model), binary=str(binary), slots=2, context=2048, threads=1, extra=extra
        ),
        store=StoreSettings(dir=str(tmp_path / "store"), staging_dir=str(tmp_path / "staging")),
        tiers=TierSettings(dir=str(tiers)),
    )


async def test_flags_that_a_binary_doesnt_know_are_left_out_and_named(
    tmp_path: Path, small_tiers: Path, quick_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    binary = older_binary(
        tmp_path / "older", "--no-cache-idle-slots", "--slot-prompt-similarity", "auto"
    )
    settings = settings_of(tmp_path, small_tiers, quick_model, binary)
    life = Life(settings, Places(tmp_path, tmp_path, None, None))
    await life.start()
    try:
        assert life.state is State.READY
        for flag in ("--no-cache-idle-slots", "--slot-prompt-similarity", "--flash-attn"):
            assert f"this engine doesn't know {flag}" in caplog.text
        assert all(warmed.proved for warmed in life.deployment.prefixes.warmed)
    finally:
        await life.stop()


async def test_a_binary_that_saves_no_slots_is_served_without(
    tmp_path: Path, small_tiers: Path, quick_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    binary = older_binary(tmp_path / "older", "--slot-save-path")
    settings = settings_of(tmp_path, small_tiers, quick_model, binary)
    life = Life(settings, Places(tmp_path, tmp_path, None, None))
    await life.start()
    try:
        assert life.state is State.READY
        assert "every start is cold" in caplog.text
    finally:
        await life.stop()


async def test_an_argument_of_the_users_own_that_it_doesnt_know_is_named_at_once(
    tmp_path: Path, small_tiers: Path, quick_model: Path
) -> None:
    binary = older_binary(tmp_path / "older", "--spin")
    settings = settings_of(tmp_path, small_tiers, quick_model, binary, "--spin")
    life = Life(settings, Places(tmp_path, tmp_path, None, None))
    with pytest.raises(EngineStartError, match="doesn't know the argument --spin"):
        await life.start()
