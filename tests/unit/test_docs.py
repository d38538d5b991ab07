"""The written docs follow the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["write_docs.py", "wrap_docs.py"])
def test_a_script_that_writes_docs_would_change_nothing(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_relative_link_in_the_docs_leads_somewhere() -> None:
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing


def test_every_file_on_the_tour_of_the_code_is_there() -> None:
    text = (ROOT / "docs" / "tour-of-the-code.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+\.py)`", text))
    assert len(named) > 40
    roots = (ROOT, ROOT / "src" / "keepwarm")
    assert not [name for name in named if not any((root / name).exists() for root in roots)]
