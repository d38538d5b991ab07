"""A staging directory in shared memory is only taken where nobody else can change it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from keepwarm import staging
from keepwarm.staging import _is_ours, default_staging, make_staging
from storesamples import NoSyncDisk, opened, refused, restored, save, settings_in, slot_file


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


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm."""
    made = tmp_path / "shm"
    made.mkdir()
    monkeypatch.setattr(staging, "_SHM", made)
    return made


def test_what_is_made_again_in_shared_memory_is_as_private_as_before(
    shm: Path, tmp_path: Path
) -> None:
    path = default_staging(tmp_path / "store", need_bytes=1)
    assert path.parent.parent == shm
    store = opened(settings_in(tmp_path, staging=path), NoSyncDisk())
    extent = save(store, [1, 2, 3]).extent_id
    shutil.rmtree(path.parent)
    assert restored(store, extent, 3) == slot_file([1, 2, 3], for_engine=True)
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700, "nobody sees what is in it"
    store.close()


def test_a_name_that_somebody_else_has_taken_meanwhile_is_not_used(
    shm: Path, tmp_path: Path
) -> None:
    path = default_staging(tmp_path / "store", need_bytes=1)
    store = opened(settings_in(tmp_path, staging=path), NoSyncDisk())
    extent = save(store, [1, 2, 3]).extent_id
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with refused("io"):
        restored(store, extent, 3)
    with pytest.raises(PermissionError):
        make_staging(path)
    assert not path.exists()
    store.close()
