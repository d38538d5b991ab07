"""What a command line says of warmth, and what the kernel says of processes and disks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from keepwarm.doctor import kernel
from keepwarm.doctor.flags import ServerFlags, is_llama_server, read_flags


def test_flags_are_read_by_all_their_names() -> None:
    long = "llama-server --model m --parallel 4 --ctx-size 8192 --cache-ram 0 --threads 8"
    short = "llama-server -m m -np 4 -c 8192 -cram 0 -t 8"
    inline = "llama-server --model=m --parallel=4 --ctx-size=8192 --cache-ram=0 --threads=8"
    expected = ServerFlags(slots=4, context_tokens=8192, cache_ram_mib=0, threads=8, model="m")
    for line in (long, short, inline):
        assert read_flags(line.split()) == expected


def test_the_last_of_two_equal_flags_counts() -> None:
    flags = read_flags(["llama-server", "-np", "4", "--kv-unified", "-np", "2", "-no-kvu"])
    assert (flags.slots, flags.unified) == (2, False)


def test_a_flag_at_the_end_without_its_value_counts_as_not_given() -> None:
    assert read_flags(["llama-server", "-np"]).slots is None


@pytest.mark.parametrize(
    ("line", "empties"),
    [
        ("", True),
        ("-np 4", False),
        ("-np 4 -kvu", True),
        ("-np 4 -kvu --no-cache-idle-slots", False),
        ("-np 4 -kvu --cache-ram 0", False),
        ("--no-kv-unified", False),
        ("-np 4 -kvu --cache-ram 4096", True),
    ],
)
def test_which_flags_empty_idle_slots(line: str, empties: bool) -> None:
    assert read_flags(["llama-server", *line.split()]).empties_idle_slots is empties


def test_a_server_is_known_by_its_name_or_its_options() -> None:
    assert is_llama_server(["/opt/bin/llama-server", "-m", "x"])
    assert is_llama_server(["/usr/bin/python", "wrapper.py", "--slot-save-path", "/x"])
    assert not is_llama_server(["/usr/bin/python", "-m", "keepwarm.engine.child"])
    assert not is_llama_server([])


def test_the_process_behind_a_port_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert kernel.listening_pid(port) == os.getpid()
    assert kernel.listening_pid(port) is None


def test_a_process_command_line_comes_word_by_word() -> None:
    words = kernel.command_line(os.getpid())
    assert words
    assert "python" in words[0]
    assert kernel.command_line(2**22 + 1) is None


def test_swap_is_read_from_the_process_status(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tllama\nVmRSS:\t  900 kB\nVmSwap:\t  512 kB\n")
    assert kernel.swapped_bytes(7, tmp_path) == 512 * 1024
    assert kernel.swapped_bytes(8, tmp_path) is None


def test_a_control_groups_quota_limits_the_cores(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroup / "box").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/box\n")
    (cgroup / "box" / "cpu.max").write_text("100000 100000\n")
    assert kernel.usable_cores(proc, cgroup) == 1
    (cgroup / "box" / "cpu.max").write_text("max 100000\n")
    assert kernel.usable_cores(proc, cgroup) == len(os.sched_getaffinity(0))


def test_the_older_control_groups_quota_limits_the_cores_too(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroup / "cpu" / "box").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/x\n1:cpu,cpuacct:/box\n")
    (cgroup / "cpu" / "box" / "cpu.cfs_quota_us").write_text("100000\n")
    (cgroup / "cpu" / "box" / "cpu.cfs_period_us").write_text("100000\n")
    assert kernel.usable_cores(proc, cgroup) == 1


def test_the_innermost_mount_tells_the_file_system(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 0:9 / {tmp_path}/with\\040blank rw shared:1 - nfs4 host:/x rw\n"
        f"3 1 0:8 / {tmp_path}/with rw - xfs /dev/b rw\n"
    )
    assert kernel.file_system(tmp_path / "with blank" / "a", proc) == "nfs4"
    assert kernel.file_system(tmp_path / "with", proc) == "xfs"
    assert kernel.file_system(tmp_path / "other", proc) == "ext4"


def test_measuring_a_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = kernel.look_at_disk(tmp_path)
    assert disk
    assert disk.write_bytes_s
    assert disk.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert kernel.look_at_disk(tmp_path / "missing") is None
