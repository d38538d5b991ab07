"""A staging directory in shared memory is only taken where nobody else can change it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keepwarm.staging import _is_ours


def test_a_new_directory_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "keepwarm-1"
    assert _is_ours(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _is_ours(folder)


@pytest.mark.parametrize(("mode", "ours"), [(0o755, True), (0o770, False), (0o777, False)])
def test_a_directory_that_others_may_change_is_a_trap(
    tmp_path: Path, mode: int, ours: bool
) -> None:
    folder = tmp_path / "keepwarm-1"
    folder.mkdir()
    folder.chmod(mode)
    assert _is_ours(folder) is ours


def test_neither_a_link_nor_a_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "file").touch()
    assert not _is_ours(tmp_path / "link")
    assert not _is_ours(tmp_path / "file")


def test_another_users_directory_is_not_taken(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    folder = tmp_path / "keepwarm-1"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    assert not _is_ours(folder)
