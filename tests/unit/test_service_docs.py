"""docs/operations.md says what the code does and what arithmetic gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keepwarm.settings import StoreSettings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def _rows(columns: int) -> list[list[str]]:
    lines = [line for line in TEXT.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns]


def _number(text: str) -> int:
    return int(re.sub(r"\D", "", text))


@pytest.mark.parametrize("row", _rows(7)[1:], ids=lambda row: row[0])
def test_bytes_a_token_follow_from_the_models_shape(row: list[str]) -> None:
    layers, heads, dimension, a_token = (_number(cell) for cell in row[1:5])
    assert a_token == layers * 2 * heads * dimension * 2
    assert _number(row[5]) == round(a_token * 2_000 / 1e6)
    assert _number(row[6]) == round(a_token * 16_000 / 1e6)


@pytest.mark.parametrize(
    "row", [row for row in _rows(6) if " layers " in row[5]], ids=lambda row: row[0]
)
def test_windowed_models_keep_full_layers_and_a_window(row: list[str]) -> None:
    full, layers = (int(part) for part in row[1].split(" of "))
    heads, dimension, a_token = (_number(cell) for cell in row[2:5])
    assert a_token == full * 2 * heads * dimension * 2
    match = re.fullmatch(r"(\d+) layers \S ([\d,]+) tokens: (\d+) MB", row[5])
    assert match
    assert int(match[1]) == layers - full
    window_bytes = (layers - full) * 2 * heads * dimension * 2 * _number(match[2])
    assert int(match[3]) == round(window_bytes / 1e6)


def test_the_quota_and_staging_named_are_the_defaults() -> None:
    defaults = StoreSettings()
    assert defaults.quota_bytes == 20 << 30
    assert defaults.staging_bytes == 1 << 30
    assert "20 GiB" in TEXT
    assert "`store.staging_bytes`, 1 GiB" in TEXT


def test_every_code_of_the_doctor_is_explained_and_no_other() -> None:
    written: set[str] = set()
    for path in [
        *(ROOT / "src" / "keepwarm" / "doctor").glob("*.py"),
        ROOT / "src" / "keepwarm" / "cli" / "doctor.py",
    ]:
        source = path.read_text(encoding="utf-8")
        written |= set(re.findall(r'(?:Finding|_slow)\(\s*"(\w+)"', source))
    section = TEXT.partition("`code` in `--json`")[2].partition("## Read")[0]
    table = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == written
