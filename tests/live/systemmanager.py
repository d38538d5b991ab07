"""A systemd system manager in namespaces of its own: PID 1 of a process tree that a test ends.

Nothing of the machine is touched: /run and /var/lib are memory that goes with it, and the only
units it knows are those in the test's own folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

_PROGRAM = Path("/usr/lib/systemd/systemd")
# What every unit depends on by default, with nothing in it.
_TARGETS = ("default", "sysinit", "basic", "shutdown", "umount", "multi-user", "network")
_NAMESPACES = ("--pid", "--mount", "--uts", "--ipc", "--cgroup")


class SystemManager:
    """See the module. It needs root and `unshare`."""

    def __init__(self, root: Path) -> None:
        """Start it, or skip the test and say why."""
        if os.geteuid() != 0:
            pytest.skip("a system manager of one's own needs root")
        for program in ("unshare", "nsenter", "systemctl"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} isn't installed")
        if not _PROGRAM.exists():
            pytest.skip("systemd isn't installed")
        self.units = root / "units"
        self.units.mkdir()
        self.log = root / "system.log"
        for name in _TARGETS:
            text = "[Unit]\nDescription=Empty\nDefaultDependencies=no\n"
            (self.units / f"{name}.target").write_text(text)
        (self.units / "service.d").mkdir()
        (self.units / "service.d" / "output.conf").write_text(
            f"[Service]\nStandardOutput=append:{self.log}\nStandardError=append:{self.log}\n"
        )
        script = (
            "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib"
            f" && export container=other SYSTEMD_UNIT_PATH={self.units}"
            f" && exec {_PROGRAM} --system --show-status=no --log-target=console"
        )
        with self.log.open("a") as sink:
            self._process = subprocess.Popen(
                [
                    "unshare",
                    *_NAMESPACES,
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                    "sh",
                    "-c",
                    script,
                ],
                stdout=sink,
                stderr=sink,
                stdin=subprocess.DEVNULL,
            )
        self._enter: list[str] = []
        deadline = time.monotonic() + 20
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                pytest.skip(f"no system manager can run here: {self.log.read_text()[-300:]}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        if not children.split():
            return False
        pid = children.split()[0]
        self._enter = ["nsenter", "-t", pid, *("-m", "-p", "-u", "-i", "-C")]
        return self.systemctl("is-system-running", check=False).stdout.strip() == "running"

    def stop(self) -> None:
        """End it and all it runs."""
        self._process.kill()
        self._process.wait(30)

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self._enter, "systemctl", "--no-pager", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check and done.returncode:
            pytest.fail(f"systemctl {words} failed: {done.stderr}\n{self.log.read_text()[-3000:]}")
        return done

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", f"--property={key}", "--value", unit).stdout.strip()

    def inside(self, *command: str) -> str:
        """What a command says in there."""
        done = subprocess.run(
            [*self._enter, *command], capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout
