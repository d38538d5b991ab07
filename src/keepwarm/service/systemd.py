"""The systemd on this machine: where units lie, `systemctl`, `systemd-analyze`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from keepwarm.errors import ConfigError
from keepwarm.service.render import Scope

_SYSTEM_UNITS = Path("/etc/systemd/system")
_LINGER = Path("/var/lib/systemd/linger")
_CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Checked:
    """What `systemd-analyze verify` says. `ran` False: it isn't there or can't run here."""

    ran: bool
    is_valid: bool
    lines: tuple[str, ...]


def template(name: str, scope: Scope) -> str:
    """A unit as it stands in deploy/systemd: in the package, or in a checkout's root.

    Raises:
        ConfigError: it isn't there.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "deploy", package.parents[1] / "deploy"):
        path = root / "systemd" / ("user" if scope is Scope.USER else "") / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ConfigError(
        f"The unit {name} didn't come with this installation; install Keepwarm again."
    )


def warmup_command(keepwarm: str, python: str) -> list[str]:
    """What warms a plain server: the script of a checkout, else the command that it calls."""
    script = Path(__file__).resolve().parents[3] / "scripts" / "warmup_cache.py"
    return [python, str(script)] if script.is_file() else [keepwarm, "warmup"]


def unit_directory(scope: Scope, config_home: Path) -> Path:
    """Where an administrator's or a user's own units lie (systemd.unit(5))."""
    return config_home / "systemd" / "user" if scope is Scope.USER else _SYSTEM_UNITS


def verify(name: str, text: str, scope: Scope) -> Checked:
    """Have systemd read the unit before it is installed."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return Checked(ran=False, is_valid=True, lines=())
    with tempfile.TemporaryDirectory(prefix="keepwarm-") as directory:
        path = Path(directory) / name
        path.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run(
                [program, *_user(scope), "verify", "--man=no", str(path)],
                capture_output=True,
                text=True,
                timeout=_CALL_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return Checked(ran=False, is_valid=True, lines=())
    lines = tuple(line for line in done.stderr.splitlines() if line.strip())
    if any("Failed to initialize manager" in line for line in lines):
        # A user's manager needs XDG_RUNTIME_DIR, which an ssh command or a container may lack.
        return Checked(ran=False, is_valid=True, lines=lines)
    # Other units on the machine may have faults of their own.
    own = tuple(line.replace(str(path), name) for line in lines if name in line)
    return Checked(ran=True, is_valid=done.returncode == 0 or not own, lines=own)


def systemctl(scope: Scope, *arguments: str) -> tuple[bool, str]:
    """Run `systemctl`; whether it succeeded, and what it said."""
    program = shutil.which("systemctl")
    if program is None:
        return False, "systemctl isn't installed"
    try:
        done = subprocess.run(
            [program, *_user(scope), "--no-pager", *arguments],
            capture_output=True,
            text=True,
            timeout=None if "start" in arguments or "--now" in arguments else _CALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def properties(scope: Scope, name: str, wanted: tuple[str, ...]) -> dict[str, str] | None:
    """Properties of a unit; None where no systemd answers."""
    done, text = systemctl(scope, "show", f"--property={','.join(wanted)}", name)
    if not done:
        return None
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, _, value in pairs if key in wanted}


def lingers(user: str) -> bool:
    """Whether a user's services run while they aren't logged in."""
    return (_LINGER / user).exists()


def write(path: Path, text: str) -> None:
    """Write a unit so that it is there whole or not at all.

    Raises:
        ConfigError: it can't be written; what was there is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.new")
        staged.write_text(text, encoding="utf-8")
        staged.chmod(0o644)
        staged.replace(path)
    except OSError as error:
        hint = "Run it as root, or give --user." if isinstance(error, PermissionError) else ""
        raise ConfigError(f"{path} can't be written ({error.strerror}). {hint}".strip()) from error


def _user(scope: Scope) -> list[str]:
    return ["--user"] if scope is Scope.USER else []
