#!/usr/bin/env python3
"""Install the clients that `make test-clients` runs, in pinned versions, below one directory.

None of their install scripts is run: where a package would fetch or unpack its program by one, the
package that holds the program is named itself. A client that can't be installed here is left out,
and its tests are skipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "@anthropic-ai/claude-code": "2.1.332",
    "@earendil-works/pi-coding-agent": "1.6.0",
    "@openai/codex": "0.171.0",
    "@qwen-code/qwen-code": "0.24.4",
    "opencode-ai": "1.18.33",
}
# By the machine: programs of two of them, and a Node that is new enough for the others.
PROGRAMS = {
    "@anthropic-ai/claude-code-{system}-{machine}": "2.1.332",
    "opencode-{system}-{machine}": "1.18.33",
    "node-{system}-{machine}": "24",
}
AIDER = "aider-chat==0.86.2"
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


def main() -> int:
    """Install what isn't there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path(".cache/clients"))
    parser.add_argument("--aider", action="store_true", help="Aider, too: some 500 MB.")
    asked = parser.parse_args()
    directory: Path = asked.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        print("npm isn't installed: no client is, either", file=sys.stderr)
    else:
        _install_npm(npm, directory)
    if asked.aider:
        _install_aider(directory)
    print(directory)
    return 0


def _install_npm(npm: str, directory: Path) -> None:
    names = {"system": platform.system().lower(), "machine": _MACHINES[platform.machine().lower()]}
    wanted = PACKAGES | {name.format(**names): version for name, version in PROGRAMS.items()}
    done = directory / "installed.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        return
    packages = [f"{name}@{version}" for name, version in wanted.items()]
    (directory / "package.json").write_text("{}", encoding="utf-8")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *packages]
    subprocess.run(command, cwd=directory, check=True)
    _link(directory, names)
    done.write_text(json.dumps(wanted), encoding="utf-8")


def _link(directory: Path, names: dict[str, str]) -> None:
    """One directory of programs, which tests put at the front of the PATH."""
    modules, programs = directory / "node_modules", directory / "bin"
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir()
    places = {name: modules / ".bin" / name for name in ("pi", "codex", "qwen")}
    system, machine = names["system"], names["machine"]
    places["claude"] = modules / "@anthropic-ai" / f"claude-code-{system}-{machine}" / "claude"
    places["opencode"] = modules / f"opencode-{system}-{machine}" / "bin" / "opencode"
    places["node"] = modules / f"node-{system}-{machine}" / "bin" / "node"
    for name, path in places.items():
        if path.exists():
            (programs / name).symlink_to(path)


def _install_aider(directory: Path) -> None:
    place = directory / "aider"
    if (place / "bin" / "aider").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", AIDER]
    if subprocess.run(pip, check=False).returncode == 0:
        (directory / "bin").mkdir(exist_ok=True)
        (directory / "bin" / "aider").symlink_to(place / "bin" / "aider")


if __name__ == "__main__":
    sys.exit(main())
